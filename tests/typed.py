"""The tests that run once more with shapes and types checked: together they call every function of the library.

Checks in every test would take two thirds of the suite's time. So `make test` runs all tests without them, and then
those marked `typed` with them. This plugin marks them, and fails a run of all tests in which some function with
annotations was called by none of them. `make test-deep` checks everywhere.
"""

import ast
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "fisherfn"
TESTS = (
    "tests/distributed/test_alone.py",
    "tests/layers/test_copied.py",
    "tests/layers/test_einsum.py",
    "tests/methods/test_all.py::test_saved_and_resumed_is_the_straight_run[language-exactNG",
    "tests/test_coverage.py::test_a_notebook_shows_the_report_as_a_table",
    "tests/test_uncovered.py",
    "tests/stats/test_refused.py",
    "tests/decompositions/test_attention.py::test_attention_without_a_batch_is_torchs",
    "tests/stats/test_collector.py::test_statistics_are_a_tree_like_any_other",
    "tests/adapt/test_damping.py",
    "tests/adapt/test_quadratic.py",
    "tests/layers/test_affine.py",
    "tests/randomness/test_dropout.py",
    "tests/layers/test_embedding.py",
    "tests/layers/test_moments.py",
    "tests/layers/test_norm.py",
    "tests/decompositions/test_recurrent.py",
    "tests/layers/test_routed.py",
    "tests/layers/test_in_place.py::test_they_are_exact_layers[relu, by place",
    "tests/randomness/test_shared_masks.py::test_calls_that_copies_of_one_example_do_not_make",
    "tests/randomness/test_shared_masks.py::test_seeds_that_do_not_agree",
    "tests/randomness/test_shared_masks.py::test_a_model_that_draws_by_numpys",
    "tests/layers/test_tied.py",
    "tests/layers/test_own_family.py",
    "tests/layers/test_traps.py",
    "tests/layers/test_unit_weights.py",
    "tests/linalg/",
    "tests/methods/test_ekfac.py",
    "tests/methods/test_joined.py",
    "tests/methods/test_kl_optimal.py",
    "tests/methods/test_dense.py",
    "tests/methods/test_divergence.py",
    "tests/methods/test_two_terms.py",
    "tests/optim/test_example.py",
    "tests/stats/test_border.py",
    "tests/stats/test_build.py",
    "tests/stats/test_chunks.py",
    "tests/stats/test_functional.py",
    "tests/stats/test_implicit.py",
    *(
        f"tests/test_terms.py::{name}"
        for name in (
            "test_loss",
            "test_a_",
            "test_one",
            "test_kron",
            "test_chunks",
            "test_sampled",
            "test_the_",
            "test_many",
            "test_stat",
            "test_bad",
        )
    ),
    "tests/test_centred.py",
    "tests/test_weighted.py",
    "tests/adapt/test_line_search.py::test_it_takes_the_size",
    "tests/adapt/test_spring.py::test_three_steps",
    "tests/adapt/test_spring.py::test_a_direction_is_clipped",
    "tests/test_base.py",
    "tests/test_gradients.py",
    "tests/test_lowrank.py",
    "tests/test_members.py",
    "tests/test_per_example.py",
    "tests/test_products.py",
    "tests/test_rearrangement.py",
    "tests/test_taps.py",
    "tests/test_borders.py",
    "tests/test_categorical.py",
    "tests/test_dataset.py::test_both_passes",
    "tests/test_dataset.py::test_what_cannot_be_fitted",
    "tests/test_dataset.py::test_any_batches_give_the_factors_of_one_large_batch[mlp-categorical-kpsvd",
    "tests/test_dataset.py::test_any_batches_give_the_factors_of_one_large_batch[mlp-categorical-kfac]",
    "tests/test_dataset.py::test_further_batches",
    "tests/test_dataset.py::test_joined",
    "tests/test_dataset.py::test_a_method_of_one_pass",
    "tests/test_diagnosis.py",
    "tests/test_influence.py::test_gradients_and_scores_of_examples_are_those_of_autograd[conv-groups",
    "tests/test_influence.py::test_the_exact_inverse_as_preconditioner",
    "tests/test_errors.py",
    "tests/test_laplace.py",
    "tests/test_likelihoods.py",
    "tests/test_natgrad.py",
    "tests/test_oracles.py",
    "tests/test_rows.py",
    "tests/test_staggered.py",
    "tests/test_tree.py",
    "tests/test_unused.py",
    "tests/adapt/test_optimizer.py::test_a_line_search_takes_the_best_of_its_grid",
    "tests/layers/test_anywhere.py::test_every_arrangement_is_exact",
    "tests/decompositions/test_attention.py::test_gpt_2_writes_its_linear_layers_transposed_and_merged",
    "tests/layers/test_elementwise.py::test_another_path_than_at_the_build_is_an_error",
    "tests/methods/test_exact.py::test_a_gradient_in_rows_is_stepped_like_its_matrix",
    "tests/methods/test_exact.py::test_its_own_fisher_is_at_no_distance",
    "tests/methods/test_kronecker_operator.py::test_an_update_leaves_statistics_and_the_old_state_as_they_were",
    "tests/methods/test_two_level.py::test_the_forms_are_different_steps",
    "tests/methods/test_two_level_state.py::test_matvec_and_error_are_the_fine_methods",
    "tests/methods/test_two_level_spaces.py::test_the_other_spelling",
    "tests/optim/test_copies.py::test_an_unpicklable_likelihood_or_method_raises_but_can_be_copied",
    "tests/optim/test_natural_gradient.py::test_damping_can_be_changed",
    "tests/optim/test_saved.py::test_a_preconditioner_goes_on_too",
    "tests/optim/test_saved.py::test_a_loaded_state_can_be_saved_before_the_first_batch",
    "tests/optim/test_watch.py::test_a_scaler_skips_the_step_and_zero_grad_drops_what_was_watched",
    "tests/test_compiled.py::test_errors_teach",
    "tests/test_examples.py::test_blocks_are_ordered_as_theory_says_and_the_errors_are_those_of_the_images",
    "tests/test_fisher.py::test_window_by_window_is_the_whole",
    "tests/test_operators.py::test_a_scipy_operator_has_every_product_of_the_damped_matrix",
    "tests/test_operators.py::test_before_the_first_update_the_approximation_is_zero_and_the_inverse_identity_"
    "over_damping",
    "tests/test_operators.py::test_single_precision_stays_single_and_the_numbers_are_double",
    "tests/test_operators.py::test_a_method_that_gives_products_alone_is_made_dense",
    "tests/test_operators.py::test_the_exact_inverse_and_the_exact_fisher_agree",
    "fisherfn/tree.py",
)
"""The beginnings of the names of the tests that are marked `typed`: quick ones, that call every function together."""

Place = tuple[str, str, int]
"""File, name and line of a function."""


def annotated() -> Iterator[Place]:
    """Every function of the library whose arguments or result have types; a body that is `...` is none."""
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not declared(node):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.returns or any(argument.annotation for argument in arguments):
                    yield str(path), node.name, node.lineno


def declared(node: ast.FunctionDef) -> bool:
    """Whether the function only says what others must have: a docstring and `...`, or an error."""
    last = node.body[-1]
    constant = isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant)
    return constant or (isinstance(last, ast.Raise) and len(node.body) <= 2)


def pytest_configure(config):
    """Note what the marked tests call, in a run of all tests."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and not config.option.markexpr and not config.option.keyword:
        config.pluginmanager.register(Calls())


def pytest_collection_modifyitems(items):
    """Mark the tests that are named above."""
    for item in items:
        if item.nodeid.startswith(TESTS):
            item.add_marker(pytest.mark.typed)


class Calls:
    """The functions of the library that were called, by the places of their code."""

    def __init__(self) -> None:
        self.codes: set[object] = set()
        self.places: set[Place] = set()
        self.missing: list[Place] = []
        sys.setprofile(self)
        importlib.import_module("fisherfn")  # some are called on import
        sys.setprofile(None)

    def __call__(self, frame, event, argument):
        if event == "call" and frame.f_code not in self.codes:
            code = frame.f_code
            self.codes.add(code)
            if code.co_filename.startswith(str(LIBRARY)):
                # the first line is that of a decorator where there is one
                self.places |= {(code.co_filename, code.co_name, line) for line in lines(code)}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        marked = item.get_closest_marker("typed") is not None
        sys.setprofile(self if marked else None)
        yield
        sys.setprofile(None)

    def pytest_sessionfinish(self, session):
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # one of several processes: the first one collects
            output["called"] = sorted(self.places)
            return
        self.missing = [place for place in annotated() if place not in self.places]
        if self.missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.missing:
            terminalreporter.section("functions that no test marked typed calls: add one to tests/typed.py", red=True)
        for path, name, line in self.missing:
            terminalreporter.write_line(f"{os.path.relpath(path)}:{line} {name}")

    def pytest_testnodedown(self, node):
        self.places |= {tuple(place) for place in node.workeroutput.get("called", ())}


def lines(code) -> range:
    """Lines on which the function's `def` may be: its code begins at the first decorator."""
    return range(code.co_firstlineno, code.co_firstlineno + 8)
