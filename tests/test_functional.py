"""deepfast.functional: NumPy's and JAX's arrays are stepped as torch's tensors are, to the bit."""

from __future__ import annotations

import copy
import re
import sys
from collections import OrderedDict, defaultdict, namedtuple
from types import MappingProxyType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from cases import NAMES, OURS
from conftest import ROOT, python, run

from deepfast.functional import Optimizer

SHAPES = {"first": (5, 7), "second": (33,), "third": ()}
STEPS = 4
OPTIONS = {"lr": 0.05, "max_grad_norm": 0.7, "weight_decay": 0.1}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64, "bfloat16": torch.bfloat16}


def drawn(seed: int, dtype: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to(DTYPES[dtype]) for name, shape in SHAPES.items()}


def as_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: t.numpy().copy() for name, t in tensors.items()}


def as_jax(tensors: dict[str, torch.Tensor]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(t.float().numpy(), dtype=str(t.dtype).split(".")[1]) for name, t in tensors.items()}


def as_torch(arrays: dict) -> dict[str, torch.Tensor]:
    return {name: torch.from_dlpack(array).clone() for name, array in arrays.items()}


def by_torch(name: str, dtype: str, **options) -> list[dict[str, torch.Tensor]]:
    """Parameters after each step of the class itself, on tensors."""
    params = {k: torch.nn.Parameter(t) for k, t in drawn(0, dtype).items()}
    optimizer = OURS[name](params.values(), **{**OPTIONS, **options})
    seen = []
    for step in range(STEPS):
        for k, grad in drawn(1 + step, dtype).items():
            params[k].grad = grad
        optimizer.step()
        seen.append({k: p.detach().clone() for k, p in params.items()})
    return seen


def assert_same(arrays: dict, tensors: dict[str, torch.Tensor]) -> None:
    assert arrays.keys() == tensors.keys()
    for name, t in as_torch(arrays).items():
        assert t.dtype == tensors[name].dtype
        assert torch.equal(t, tensors[name]), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_place_has_torchs_bits(name, dtype):
    optimizer = Optimizer(OURS[name], **OPTIONS)
    params = as_numpy(drawn(0, dtype))
    same, memory = dict(params), [array.ctypes.data for array in params.values()]
    state = optimizer.init(params)
    for step, expected in enumerate(by_torch(name, dtype)):
        grads = as_numpy(drawn(1 + step, dtype))
        assert optimizer.update_(grads, state, params) is None
        assert_same(params, expected)
        assert_same(grads, drawn(1 + step, dtype))
    assert all(params[key] is array for key, array in same.items())
    assert [array.ctypes.data for array in params.values()] == memory


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_jax_has_torchs_bits_and_its_old_arrays_stay(name, dtype):
    optimizer = Optimizer(OURS[name], **OPTIONS)
    params = as_jax(drawn(0, dtype))
    state = optimizer.init(params)
    history = [params]
    for step, expected in enumerate(by_torch(name, dtype)):
        grads = as_jax(drawn(1 + step, dtype))
        params, state = optimizer.update(grads, state, params)
        assert all(isinstance(array, jax.Array) for array in params.values())
        assert_same(grads, drawn(1 + step, dtype))
        assert_same(params, expected)
        history.append(params)
    for kept, expected in zip(history, [drawn(0, dtype), *by_torch(name, dtype)], strict=True):
        assert_same(kept, expected)


@pytest.mark.parametrize("options", [{"master": "fp32"}, {"state_dtype": "int8"}, {"master": "none"}], ids=str)
def test_storage_forms(options):
    params = as_numpy(drawn(0, "float16"))
    optimizer = Optimizer(OURS["AdamW"], **OPTIONS, **options)
    state = optimizer.init(params)
    for step, expected in enumerate(by_torch("AdamW", "float16", **options)):
        params, state = optimizer.update(as_numpy(drawn(1 + step, "float16")), state, params)
        assert isinstance(params["first"], np.ndarray)
        assert_same(params, expected)


@pytest.mark.parametrize("master", ["split", "fp32"])
def test_what_is_written_between_steps_counts(master):
    """Of a 16-bit array, too, whose master knows nothing of it."""
    params = {"w": np.ones(4, np.float16)}
    optimizer = Optimizer(OURS["SGD"], lr=0.5, master=master)
    state = optimizer.init(params)
    optimizer.update_({"w": np.ones(4, np.float16)}, state, params)
    params["w"][:2] = 8
    optimizer.update_({"w": np.ones(4, np.float16)}, state, params)
    assert params["w"].tolist() == [7.5, 7.5, 0, 0]


def test_any_nesting_in_any_order_of_keys():
    pair = namedtuple("pair", "w b")
    flat = as_numpy(drawn(0, "float32"))
    tree = {"z": [flat["third"]], "a": pair(flat["first"], (flat["second"],))}
    slopes = as_numpy(drawn(1, "float32"))
    optimizer = Optimizer(OURS["AdamW"], **OPTIONS)
    new, state = optimizer.update(
        {"a": pair(slopes["first"], (slopes["second"],)), "z": [slopes["third"]]}, optimizer.init(tree), tree
    )
    assert state.places == ["['a'][0]", "['a'][1][0]", "['z'][0]"]
    assert isinstance(new["a"], pair)
    found = {"first": new["a"].w, "second": new["a"].b[0], "third": new["z"][0]}
    assert_same(found, by_torch("AdamW", "float32")[0])
    assert_same(flat, drawn(0, "float32"))


class Named(dict):
    """One of somebody's own."""


MAPPINGS = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda items: defaultdict(list, items),
    "a subclass": Named,
    "one that is no dict": MappingProxyType,
    "one inside the other": lambda items: OrderedDict(z=Named(items), a=defaultdict(list, items)),
}


@pytest.mark.parametrize("convert", [as_numpy, as_jax])
@pytest.mark.parametrize("kind", MAPPINGS)
def test_mappings_keep_class_and_order(kind, convert):
    """As JAX's trees have them: it takes no two that differ in either."""
    optimizer = Optimizer(OURS["AdamW"], **OPTIONS)
    backwards = dict(reversed(convert(drawn(0, "float32")).items()))
    params = MAPPINGS[kind](backwards)
    new, state = optimizer.update(MAPPINGS[kind](convert(drawn(1, "float32"))), optimizer.init(params), params)
    assert state.places == sorted(state.places)
    jax.tree.map(lambda now, before: None, new, params)
    for one, other in [(new, params)] if kind != "one inside the other" else [(new[k], params[k]) for k in "za"]:
        assert type(one) is type(other)
        assert list(one) == list(other) == list(backwards)
        assert getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
    if kind != "one inside the other":
        assert_same(new, by_torch("AdamW", "float32")[0])


def test_one_array_and_torchs_own():
    w, grad = torch.ones(3), torch.ones(3)
    optimizer = Optimizer(OURS["SGD"], lr=0.5)
    state = optimizer.init(w)
    new, state = optimizer.update(grad, state, w)
    assert isinstance(new, torch.Tensor)
    assert new.tolist() == [0.5] * 3
    optimizer.update_(jnp.ones(3), state, w)  # gradients of another library
    assert w.tolist() == [0.5] * 3


def test_the_learning_rate_may_change_and_the_norm_is_known():
    params = np.zeros(4, np.float32)
    optimizer = Optimizer(OURS["SGD"], lr=1.0, max_grad_norm=1.0)
    state = optimizer.init(params)
    moved = []
    for lr in (None, 0.25, None, np.float32(0.5)):
        before = params.copy()
        optimizer.update_(np.full(4, 8, np.float32), state, params, lr=lr)
        moved.append(float((before - params)[0]))
    assert moved == pytest.approx([0.5, 0.125, 0.125, 0.25])  # from then on
    assert state.optimizer.grad_norm.item() == 16


@pytest.mark.parametrize("convert", [as_numpy, as_jax])
def test_a_saved_state_goes_on_in_another_process_of_either_library(convert, tmp_path):
    optimizer = Optimizer(OURS["AdamW"], **OPTIONS)
    params = as_numpy(drawn(0, "float32"))
    state = optimizer.init(params)
    for step in range(2):
        optimizer.update_(as_numpy(drawn(1 + step, "float32")), state, params)
    torch.save({"params": as_torch(params), "state": state.optimizer.state_dict()}, tmp_path / "saved.pt")

    saved = torch.load(tmp_path / "saved.pt")
    params = convert(dict(reversed(saved["params"].items())))
    state = optimizer.init(params)
    state.optimizer.load_state_dict(saved["state"])
    for step in range(2, STEPS):
        params, state = optimizer.update(convert(drawn(1 + step, "float32")), state, params)
    assert_same(dict(reversed(params.items())), by_torch("AdamW", "float32")[-1])


def test_a_state_is_used_up_unless_it_is_copied():
    optimizer = Optimizer(OURS["AdamW"], **OPTIONS)
    old, grads = as_jax(drawn(0, "float32")), as_jax(drawn(1, "float32"))
    first = optimizer.init(old)
    kept = copy.deepcopy(first)
    new, _ = optimizer.update(grads, first, old)
    with pytest.raises(ValueError, match="used up by update"):
        optimizer.update(grads, first, old)
    again, _ = optimizer.update(grads, kept, old)
    assert_same(again, as_torch(new))


def test_jitted_gradients_feed_it():
    def loss(params, x):
        return jnp.mean((x @ params["w"] + params["b"] - 3 * x.sum(1) - 1) ** 2)

    x = jax.random.normal(jax.random.key(0), (64, 4))
    params = {"w": jnp.zeros(4), "b": jnp.zeros(())}
    optimizer = Optimizer(OURS["AdamW"], lr=0.1, weight_decay=0.0)
    state, gradient = optimizer.init(params), jax.jit(jax.grad(loss))
    begun = loss(params, x)
    for _ in range(200):
        params, state = optimizer.update(gradient(params, x), state, params)
    assert begun > 10
    assert loss(params, x) < 1e-3


def refused(call, *words: str) -> None:
    with pytest.raises(ValueError, match=r"^deepfast: ") as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def read_only() -> np.ndarray:
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("array", [read_only(), jnp.ones(3), np.asarray(jnp.ones(3))], ids=["numpy", "jax", "a view"])
def test_what_is_read_only_is_not_written(array):
    optimizer = Optimizer(OURS["SGD"], lr=0.5)
    params = {"v": np.ones(2, np.float32), "w": array}
    grads = {"v": np.ones(2, np.float32), "w": np.ones(3, np.float32)}
    state = optimizer.init(params)
    refused(lambda: optimizer.update_(grads, state, params), "params['w']", "read-only", "update()")
    assert params["v"].tolist() == [1, 1]
    assert array.tolist() == [1, 1, 1]
    new, _ = optimizer.update(grads, state, params)
    assert new["w"].tolist() == [0.5] * 3
    assert array.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"w": np.arange(3)}, ("params['w']", "int64", "fp32")),
        ([np.ones(3, np.float32), 1.0], ("params[1]", "float")),
        ({"w": None}, ("params['w']", "NoneType")),
        ({"w": {"x": "text"}}, ("params['w']['x']", "str")),
        ({"w": np.ones(3, ml_dtypes.bfloat16)}, ("params['w']", "DLPack")),
        ({"w": jnp.ones(3, jnp.float8_e4m3fn)}, ("params['w']", "float8")),
        ({"w": torch.ones(3, requires_grad=True)}, ("params['w']", "detach")),
        ({"w": np.ones(3, np.complex64)}, ("params['w']", "complex64")),
    ],
)
def test_what_cannot_be_stepped_is_named(params, words):
    refused(lambda: Optimizer(OURS["SGD"]).init(params), *words)


def test_an_array_that_lies_backwards_is_named():
    """In a process of its own: torch ends one that gives it such strides."""
    done = python(
        "import numpy, deepfast\n"
        "optimizer = deepfast.functional.Optimizer(deepfast.SGD)\n"
        "try: optimizer.init({'w': numpy.ones((3, 2))[::-1]})\n"
        "except ValueError as error: print(error)\n"
    )
    assert "params['w']" in done.stdout, done.stderr
    assert "backwards" in done.stdout


def test_under_jit_it_says_that_it_cannot():
    optimizer = Optimizer(OURS["SGD"])
    state = optimizer.init(jnp.ones(3))
    refused(lambda: jax.jit(lambda w: optimizer.update(w, state, w)[0])(jnp.ones(3)), "Tracer", "jax.jit")


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "new"])
@pytest.mark.parametrize(
    ("grads", "words"),
    [
        ({"v": np.ones(2, np.float32)}, ("grads['w']", "missing")),
        ({"v": np.ones(2, np.float32), "w": np.ones(3, np.float32), "x": np.ones(1)}, ("grads['x']", "missing")),
        ({"v": np.ones(2, np.float32), "w": np.ones(4, np.float32)}, ("grads['w']", "shape", "[4]", "[3]")),
        ({"v": np.ones(2, np.float32), "w": np.ones(3)}, ("grads['w']", "dtype", "float64", "float32")),
        ({"v": np.ones(2, np.float32), "w": torch.ones(3, device="meta")}, ("grads['w']",)),
        ([np.ones(2, np.float32), np.ones(3, np.float32)], ("grads['v']", "missing")),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_has_changed(grads, words, inplace):
    optimizer = Optimizer(OURS["SGD"], lr=0.5, momentum=0.9)
    params = {"v": np.ones(2, np.float32), "w": np.ones(3, np.float32)}
    state = optimizer.init(params)
    refused(lambda: (optimizer.update_ if inplace else optimizer.update)(grads, state, params), *words)
    assert params["v"].tolist() == [1, 1]
    assert not state.optimizer.state
    optimizer.update_({k: np.ones_like(v) for k, v in params.items()}, state, params)
    assert params["w"].tolist() == [0.5] * 3


def test_other_parameters_than_at_first_are_named():
    optimizer = Optimizer(OURS["SGD"])
    state = optimizer.init({"w": np.ones(3, np.float32)})
    grads = {"w": np.ones(3, np.float32)}
    refused(lambda: optimizer.update(grads, state, {"w": np.ones(3)}), "params['w']", "dtype")
    refused(lambda: optimizer.update(grads, state, {"v": np.ones(3, np.float32)}), "params['v']", "missing")


def test_it_is_made_of_a_class_that_resets_no_gradients():
    refused(lambda: Optimizer(OURS["SGD"], reset_grad=True), "only reads gradients: no reset_grad")
    assert Optimizer(OURS["SGD"], reset_grad=False).init(np.ones(3)).optimizer.reset_grad is False
    for wrong in (torch.optim.AdamW, OURS["SGD"]([torch.nn.Parameter(torch.ones(1))]), "AdamW", None, dict):
        with pytest.raises(
            TypeError, match=r"^deepfast: functional.Optimizer takes a class like deepfast.AdamW, not "
        ) as error:
            Optimizer(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "figure"), [("numpy_loop", "accuracy"), ("jax_loop", "loss")])
def test_the_examples_learn(name, figure, tmp_path):
    done = run(sys.executable, ROOT / "examples" / f"{name}.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_, last = map(float, re.findall(rf"{figure} ([\d.]+)", done.stdout))
    if figure == "accuracy":
        assert last > 0.98  # half of the plane lies within the disc
    else:
        assert last < first / 100


def test_it_is_short():
    files = [ROOT / "deepfast" / "functional.py", *(ROOT / "examples").glob("*_loop.py")]
    lines = {f.name: len(f.read_text().splitlines()) for f in files if f.stem != "accelerate_loop"}
    assert lines.keys() == {"functional.py", "numpy_loop.py", "jax_loop.py"}
    assert sum(lines.values()) <= 150
