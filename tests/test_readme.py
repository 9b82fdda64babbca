"""The README and docs/ are true: what can be looked up is, and what is generated is up to date."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import ROOT, python

from deepfast import build

sys.path.insert(0, str(ROOT / "tools"))

import readme

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def of(page: str) -> str:
    return PAGES[ROOT / "docs" / page]


@pytest.mark.parametrize(("page", "name", "generated"), readme.PAGES, ids=[name for _, name, _ in readme.PAGES])
def test_what_is_generated_is_up_to_date(page, name, generated):
    text = PAGES[ROOT / page]
    assert readme.between(text, name, generated()) == text, "run: make readme"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert max(map(len, README.splitlines())) <= 600


def anchors(text: str) -> set[str]:
    """As GitHub names headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_every_link_leads_somewhere(path):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[path]) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked_from_the_readme():
    for path in PAGES:
        assert path.name == "README.md" or f"(docs/{path.name}" in README, path.name


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_every_file_that_is_named_is_there(path):
    quoted = re.findall(r"`((?:tests|benchmarks|examples|csrc|tools|kernels|deepfast)/[^`\s]*)`", PAGES[path])
    for name in quoted:
        assert any(ROOT.glob(name.rstrip("/"))), name


def test_every_claim_names_where_it_is_seen():
    table = README[README.index("| seen in |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 10
    for row in table:
        claim, seen = row.strip("| ").rsplit(" | ", 1)
        links = re.findall(r"\]\(([^)#]+)", seen)
        assert any(link.startswith(("tests/", "benchmarks/")) for link in links), claim


def test_the_example_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = python(code)
    assert done.returncode == 0, done.stderr
    loss, norm = map(float, done.stdout.split())
    assert loss < 40  # from about 64, the variance of a sum of 64
    assert norm > 0


BEFORE = {  # what a page's examples are written for
    "engine.md": """
import json, torch, deepfast
class Model(torch.nn.Linear):
    def forward(self, batch):
        return super().forward(batch).square().mean()
model, data = Model(4, 4), torch.ones(64, 4)
settings = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
json.dump(settings, open("ds_config.json", "w"))
""",
    "collectives.md": "import torch, deepfast\n",
    "frameworks.md": """
import numpy, deepfast
params, grads = {"w": numpy.ones(3)}, {"w": numpy.ones(3)}
optimizer = deepfast.functional.Optimizer(deepfast.AdamW, lr=1e-3)
""",
}
BETWEEN = {
    "engine.md": """
trained = dict(model.named_parameters())
moment = optimizer.state[trained["weight"]]["exp_avg"]
model = Model(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
""",
    "collectives.md": "ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))\n",
}
AFTER = {
    "engine.md": """
assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)
""",
    "collectives.md": """
ddp(torch.ones(4)).sum().backward()
assert torch.distributed.get_backend() == "deepfast" and ddp.module.weight.grad.sum() == 16
""",
    "frameworks.md": "assert numpy.allclose(params['w'], 0.998, atol=1e-4)\n",
}


@pytest.mark.parametrize("path", list(PAGES)[1:], ids=[path.name for path in list(PAGES)[1:]])
def test_the_examples_of_a_page_run(path, tmp_path):
    examples = re.findall(r"```python\n(.*?)```", PAGES[path], re.DOTALL)
    assert bool(examples) == (path.name in BEFORE)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    code = BEFORE.get(path.name, "") + BETWEEN.get(path.name, "").join(examples) + AFTER.get(path.name, "")
    done = python(code, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr


def test_every_environment_variable_is_listed():
    read = set()
    for path in (*(ROOT / "deepfast").rglob("*.py"), ROOT / "setup.py"):
        read |= set(re.findall(r"DEEPFAST_[A-Z_]+", path.read_text(encoding="utf-8")))
    assert read == set(re.findall(r"^\| `(DEEPFAST_[A-Z_]+)`", of("environment.md"), re.MULTILINE))


def test_the_files_it_counts_are_the_files_there_are():
    listed = {library: [*library.kernels, *library.bindings] for library in (build.CPU, build.CUDA, build.COMM)}
    assert [len(names) for names in listed.values()] == [5, 8, 5], (
        "environment.md: five for the CPU, eight for CUDA, five between ranks"
    )
    there = [p for suffix in ("*.cpp", "*.cu") for p in build.CSRC.rglob(suffix)]
    found = sorted(str(p.relative_to(build.CSRC)) for p in there)
    assert sorted({name for names in listed.values() for name in names}) == found


def test_the_gpus_figures_are_the_results():
    """The ones that gpu.md tells in prose, from the steps' times."""
    known = json.loads((readme.RESULTS / "gpu.json").read_text(encoding="utf-8"))
    times = {figure["title"]: figure for figure in known["figures"]}

    def ratio(title: str, other: str, ours: str) -> str:
        return f"{times[title][other]['ms'] / times[title][ours]['ms']:.2f} times less than torch's"

    assert ratio("full fp16 AdamW step, 64M, cuda", "torch's parts", "full step") in of("gpu.md")
    steps = [
        figure["torch fused"]["ms"] / figure["step"]["ms"]
        for title, figure in times.items()
        if ", fp32, " in title and "torch fused" in figure and title.endswith("cuda")
    ]
    assert f"{min(steps):.2f} to {max(steps):.2f} times less" in of("gpu.md")
