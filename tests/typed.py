"""The tests that run with shapes and types checked: together they call every function of the library.

Checks in every test would take two thirds of the suite's time. So `make test` runs the tests marked `typed` with them,
and all others without. This plugin marks them, makes the checks, and fails a run of all marked tests in which some
function with annotations was called by none of them. `make test-deep` checks everywhere.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from beartype import beartype

LIBRARY = Path(__file__).parents[1] / "fisherfn"
TESTS = (
    "tests/distributed/test_alone.py",
    "tests/layers/test_copied.py::test_as_many_examples",
    "tests/layers/test_copied.py::test_the_kernel_of_a_frozen_net",
    "tests/layers/test_copied.py::test_the_older_forms",
    "tests/layers/test_copied.py::test_a_compiled_step_is_the_step",
    "tests/layers/test_copied.py::test_calls_that_torch_batches_wrongly",
    "tests/layers/test_copied.py::test_prelu_is_computed",
    "tests/layers/test_einsum.py",
    "tests/methods/test_all.py::test_saved_and_resumed_is_the_straight_run[language-exactNG",
    "tests/test_coverage.py::test_a_notebook_shows_the_report_as_a_table",
    "tests/test_uncovered.py",
    "tests/stats/test_refused.py",
    "tests/stats/test_silent.py",
    "tests/stats/test_reads.py",
    "tests/stats/test_selected.py",
    "tests/stats/test_probe.py",
    "tests/decompositions/test_elementary.py",
    "tests/optim/test_passes.py",
    "tests/decompositions/test_attention.py::test_attention_without_a_batch_is_torchs",
    "tests/stats/test_collector.py::test_statistics_are_a_tree_like_any_other",
    "tests/adapt/test_damping.py",
    "tests/adapt/test_quadratic.py",
    "tests/adapt/test_scales.py",
    "tests/stats/test_path.py",
    "tests/adapt/test_parts.py::test_one_loss",
    "tests/adapt/test_parts.py::test_a_batch_whose",
    "tests/optim/test_adaptive.py::test_weight_decay_follows",
    "tests/optim/test_combined.py::test_weights_that_were_changed",
    "tests/optim/test_combined.py::test_a_state_with_rates",
    "tests/adapt/test_look_back.py::test_the_next_batch_takes_back",
    "tests/adapt/test_optimizer.py::test_the_average_is",
    "tests/stats/test_build.py::test_numbers_that_are_not_finite",
    "tests/optim/test_adaptive.py::test_a_group_that_is_refused",
    "tests/layers/test_affine.py::test_every_norm_has_a_group",
    "tests/layers/test_affine.py::test_every_way_to_call_a_norm",
    *(
        f"tests/randomness/test_dropout.py::test_{name}"
        for name in (
            "seeds_",
            "equal_seeds",
            "a_mask",
            "the_mean",
            "masks_",
            "no_dropout",
            "without_",
            "a_model",
            "chunks_",
            "dropout_",
            "a_step",
            "the_batch",
            "both_layouts",
            "where_",
            "torchs_",
            "a_users_own",
            "numbers_",
            "drawn_numbers",
            "uniform_",
        )
    ),
    "tests/layers/test_embedding.py",
    "tests/layers/test_moments.py",
    "tests/layers/test_norm.py",
    "tests/decompositions/test_recurrent.py::test_a_cell_written",
    "tests/decompositions/test_recurrent.py::test_torchs_single_cells",
    *(
        f"tests/decompositions/test_recurrent.py::test_a_fused_net_is_exact_in_linear_layers[{name}-type2"
        for name in ("rnn", "rnn relu", "gru", "both directions", "trained start lstm", "projected")
    ),
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
    "tests/test_equal_shapes.py",
    "tests/test_gradients.py",
    "tests/test_lowrank.py",
    "tests/test_masked.py::test_models_of_a_group",
    "tests/test_masked.py::test_derivatives",
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
    "tests/test_posterior_samples.py",
    "tests/test_likelihoods.py",
    "tests/test_natgrad.py",
    "tests/test_oracles.py",
    "tests/test_rows.py",
    "tests/test_staggered.py",
    "tests/test_tree.py",
    "tests/test_unused.py",
    "tests/adapt/test_optimizer.py::test_a_line_search_takes_the_best_of_its_grid",
    "tests/adapt/test_mean_curvature.py::test_the_mean_curvature_of",
    "tests/layers/test_anywhere.py::test_every_arrangement_is_exact[keys-with-bias",
    "tests/layers/test_anywhere.py::test_every_arrangement_is_exact[half-a-weight",
    "tests/decompositions/test_attention.py::test_gpt_2_writes_its_linear_layers_transposed_and_merged",
    "tests/layers/test_elementwise.py::test_another_path_than_at_the_build_is_an_error",
    "tests/methods/test_exact.py::test_a_gradient_in_rows_is_stepped_like_its_matrix",
    "tests/methods/test_exact.py::test_so_are_gradients_of_weighted_examples_chunks_and_terms",
    "tests/methods/test_exact.py::test_its_own_fisher_is_at_no_distance",
    "tests/methods/test_kronecker_operator.py::test_an_update_leaves_statistics_and_the_old_state_as_they_were",
    "tests/methods/test_two_level.py::test_the_forms_are_different_steps",
    "tests/methods/test_two_level_state.py::test_matvec_and_error_are_the_fine_methods",
    "tests/methods/test_two_level_spaces.py::test_the_other_spelling",
    "tests/methods/test_tiny_damping.py",
    "tests/optim/test_copies.py::test_an_unpicklable_likelihood_or_method_raises_but_can_be_copied",
    "tests/optim/test_natural_gradient.py::test_damping_can_be_changed",
    "tests/optim/test_saved.py::test_a_preconditioner_goes_on_too",
    "tests/optim/test_saved.py::test_a_loaded_state_can_be_saved_before_the_first_batch",
    "tests/optim/test_scaling.py::test_a_scaler_skips_the_step_and_zero_grad_drops_what_was_watched",
    "tests/test_compiled.py::test_errors_teach",
    "tests/test_compiled.py::test_values_of_",
    "tests/test_examples.py::test_blocks_are_ordered_as_theory_says_and_the_errors_are_those_of_the_images",
    "tests/test_fisher.py::test_window_by_window_is_the_whole",
    "tests/test_operators.py::test_a_scipy_operator_has_every_product_of_the_damped_matrix",
    "tests/test_operators.py::test_before_the_first_update_the_approximation_is_zero_and_the_inverse_identity_"
    "over_damping",
    "tests/test_operators.py::test_single_precision_stays_single_and_the_numbers_are_double",
    "tests/test_operators.py::test_a_method_that_gives_products_alone_is_made_dense",
    "tests/test_operators.py::test_the_exact_inverse_and_the_exact_fisher_agree",
    "tests/test_outside_blocks.py",
    "tests/test_wrong_arguments.py",
    "fisherfn/tree.py",
)
"""The beginnings of the names of the tests that are marked `typed`: quick ones, that call every function together."""

Place = tuple[str, str]
"""Module of a function, and its qualified name."""

CALLED: set[Place] = set()
"""The functions of the library that were called."""

CHECKS: dict[tuple[Any, ...], Callable[..., Any]] = {}
"""The checks by place and annotations."""


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the type checker of jaxtyping's import hook: beartype, which looks at the annotations at the first call.

    A function inside another one is defined at every call of the outer one, and would be looked at each time: nine
    tenths of the time in tests of methods. Its checks depend only on the annotations, so they are made once.
    """
    place = (function.__module__, function.__qualname__)
    key = (*place, *function.__annotations__.items())
    try:
        hash(key)
    except TypeError:  # the arguments of a ParamSpec
        key = (*place, object())

    def check(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(place)
        found = CHECKS.get(key)
        if found is None:
            found = CHECKS[key] = beartype(function)
        return found(*args, **kwargs)

    return check


@contextmanager
def noted() -> Iterator[None]:
    """Note the calls of functions while their checks are off, if they are on in this run."""

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("fisherfn"):
            CALLED.add((frame.f_globals["__name__"], frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note if CHECKS else before)
    try:
        yield
    finally:
        sys.setprofile(before)


def annotated() -> dict[Place, str]:
    """Return file and line of every function with types in the library; a body that is `...` is none."""
    found: dict[Place, str] = {}

    def visit(node: ast.AST, module: str, path: Path, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef):
                arguments = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                if not declared(child) and (child.returns or any(argument.annotation for argument in arguments)):
                    found[module, prefix + child.name] = f"{path.relative_to(LIBRARY.parent)}:{child.lineno}"
                inner = f"{prefix}{child.name}.<locals>."
            elif isinstance(child, ast.ClassDef):
                inner = f"{prefix}{child.name}."
            visit(child, module, path, inner)

    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY.parent).with_suffix("")
        visit(ast.parse(path.read_text()), ".".join(name.parts).removesuffix(".__init__"), path, "")
    return found


def declared(node: ast.FunctionDef) -> bool:
    """Whether the function only says what others must have: a docstring and `...`, or an error."""
    last = node.body[-1]
    constant = isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant)
    return constant or (isinstance(last, ast.Raise) and len(node.body) <= 2)


def pytest_configure(config):
    """Note what the marked tests call, in a run of all of them."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and config.option.markexpr == "typed" and not config.option.keyword:
        config.pluginmanager.register(Calls())


def pytest_ignore_collect(collection_path, config):
    """Leave out the files without marked tests where only those are wanted."""
    if config.option.markexpr == "typed" and collection_path.suffix == ".py":
        file = collection_path.relative_to(LIBRARY.parent).as_posix()
        return None if any(file.startswith(name) or name.startswith(file + "::") for name in TESTS) else True
    return None


def pytest_collection_modifyitems(items):
    """Mark the tests that are named above."""
    for item in items:
        if item.nodeid.startswith(TESTS):
            item.add_marker(pytest.mark.typed)


class Calls:
    """Compares the functions that were called with those of the library."""

    def __init__(self) -> None:
        self.called: set[Place] = set()
        self.missing: list[str] = []

    def pytest_sessionfinish(self, session):
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # one of several processes: the first one collects
            output["called"] = sorted(CALLED)
            return
        self.called |= CALLED
        self.missing = [f"{file} {place[1]}" for place, file in annotated().items() if place not in self.called]
        if self.missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.missing:
            terminalreporter.section("functions that no test marked typed calls: add one to tests/typed.py", red=True)
        for line in self.missing:
            terminalreporter.write_line(line)

    def pytest_testnodedown(self, node):
        self.called |= {tuple(place) for place in node.workeroutput.get("called", ())}
