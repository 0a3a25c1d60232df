"""The nets that people have train by the drop-in optimizer and by watch, and a compiled step is the plain one."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.optional.installed import need

timm, transformers = need("timm"), need("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
N, T, CLASSES = 8, 12, 10
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
IGNORED = -100


def tokens(vocabulary):
    ids = torch.randint(5, vocabulary, (N, T))
    mask = torch.ones_like(ids)
    mask[N // 2 :, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def bert():
    config = transformers.BertConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_labels=CLASSES, **SMALL)
    return transformers.BertForSequenceClassification(config), tokens(99), torch.randint(CLASSES, (N,))


def next_token(net, vocabulary):
    x = tokens(vocabulary)
    y = x["input_ids"].roll(-1, 1).masked_fill(x["attention_mask"].roll(-1, 1) == 0, IGNORED)
    y[:, -1] = IGNORED
    return net, x, y


def gpt2():
    config = transformers.GPT2Config(vocab_size=50257, hidden_size=64, use_cache=False, **SMALL)
    return next_token(transformers.GPT2LMHeadModel(config), 50257)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_key_value_heads=2, use_cache=False, **SMALL
    )
    return next_token(transformers.LlamaForCausalLM(config), 99)


def vit():
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=CLASSES,
        init_values=0.1, drop_path_rate=0.1,
    )  # fmt: skip
    return net, torch.randn(N, 3, 32, 32), torch.randint(CLASSES, (N,))


def convnext():
    net = timm.create_model(
        "convnext_atto", depths=(1, 1, 2, 1), dims=(12, 16, 24, 32), num_classes=CLASSES, drop_path_rate=0.2
    )
    return net, torch.randn(N, 3, 64, 64), torch.randint(CLASSES, (N,))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(99, 24), nn.LSTMCell(24, 32), nn.Linear(32, CLASSES)

    def forward(self, ids):
        state = None
        for step in self.embedding(ids).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


def lstm():
    return Classifier(), torch.randint(99, (N, T)), torch.randint(CLASSES, (N,))


NETS = {
    "bert": bert,
    "gpt2-tied": gpt2,
    "llama": llama,
    "vit-layer-scale": vit,
    "convnext-drop-path": convnext,
    "lstm": lstm,
}


def made(name):
    torch.manual_seed(0)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, x, y = NETS[name]()
    return SimpleNamespace(net=net.train(), x=x, y=y)


def logits(net, x):
    outputs = net(**x) if isinstance(x, dict) else net(x)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


@pytest.mark.parametrize("name", NETS)
def test_five_steps_of_the_drop_in_lower_the_loss(name):
    case = made(name)
    opt = ff.optim.NaturalGradient(case.net, likelihood=ff.Categorical())
    losses = [float(opt.step((case.x, case.y))) for _ in range(5)]
    assert losses[-1] < 0.95 * losses[0], losses
    assert not opt.layout.fallbacks, str(opt.layout)
    if name == "gpt2-tied":
        block = opt.layout.block("transformer.wte")
        assert block.kind == "tied embedding" and len(block.uses) == 2


@pytest.mark.parametrize("name", NETS)
def test_five_watched_steps_lower_the_loss(name):
    case = made(name)
    pre = ff.optim.Preconditioner(case.net, example_inputs=case.x)
    sgd = torch.optim.SGD(case.net.parameters(), lr=0.05, momentum=0.5)
    losses = []
    for _ in range(5):
        sgd.zero_grad()
        with pre.watch():
            found = logits(case.net, case.x)
            loss = F.cross_entropy(found.flatten(0, -2), case.y.flatten(), ignore_index=IGNORED)
        loss.backward()
        pre.step()
        sgd.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses


def without_branches(case):
    """The case of a net of transformers in which the building of its mask does not look at the mask's values."""
    net, x = case.net, case.x
    if isinstance(net, transformers.PreTrainedModel):
        net.set_attn_implementation("eager")
        if hasattr(net, "bert"):
            allowed = x["attention_mask"][:, None, None, :].expand(N, 1, T, T)
            x = {**x, "attention_mask": (1.0 - allowed) * torch.finfo(torch.float32).min}
    return SimpleNamespace(net=net, x=x, y=case.y)


def compiled_is_plain(name, **options):
    case = without_branches(made(name))
    model, params, context = ff.functional(case.net)
    context = context | {"dropout": ff.dropout_seeds(N, torch.Generator().manual_seed(1))}
    ng = ff.natural_gradient(model, params, case.x, likelihood=ff.Categorical(), context=context, unused="ignore")
    batch = (case.x, case.y)
    noise = ng.noise(batch, torch.Generator().manual_seed(2))
    state = ng.init(params, damping=0.1)
    plain = ng.step(params, state, batch, noise=noise, context=context, inner=True)
    compiled = ff.compile(ng.step, **options)
    found = compiled(params, state, batch, noise=noise, context=context, inner=True)
    ff.check(found[2])
    scale = float(ff.tree.norm(plain[0]))
    assert float(ff.tree.norm(ff.tree.add(plain[0], found[0], scale=-1.0))) < 1e-3 * scale
    torch.testing.assert_close(found[2].loss, plain[2].loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2].inner, plain[2].inner, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("name", NETS)
def test_a_traced_step_is_the_plain_one(name):
    compiled_is_plain(name, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_compiled_step_is_the_plain_one(name):
    compiled_is_plain(name)
