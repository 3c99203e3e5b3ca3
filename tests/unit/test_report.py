"""The numbers of the page against dense matrices, and the page itself as a file that needs nothing else."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.analysis import Alignment
from rankwise.errors import BaseMismatch, RecipeError
from rankwise.format.peft import read_adapter
from rankwise.format.save_load import portable
from rankwise.report.drawing import standalone, svg
from rankwise.report.measure import measure, module_labels, similarities, similarity
from rankwise.report.page import AdapterPart, Report, check_place, render, write_report


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return self.down_proj(self.q_proj(x).relu())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


@pytest.fixture
def trained(tmp_path) -> tuple[nn.Module, Adapter]:
    net = rw.attach(model(), rw.LoRA(rank=3, alpha=6))
    optimizer = torch.optim.AdamW(rw.trainable_parameters(net), lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
    rw.save(net, tmp_path / "a")
    return rw.detach(net), read_adapter(tmp_path / "a")


def test_measures_are_those_of_the_dense_change(trained):
    base, adapter = trained
    for site in measure(adapter, base):
        weight = base.get_submodule(site.name).weight.detach()
        dense = adapter.sites[site.name].delta.dense()
        s = torch.linalg.svdvals(dense)[:3]
        assert site.singular_values == pytest.approx(s.tolist(), rel=1e-4)
        assert site.change == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-4)
        assert site.stable_rank == pytest.approx(float((s / s[0]).square().sum()), rel=1e-4)
        assert (site.layer, site.module) == (int(site.name[0]), site.name[2:])
        against = site.against_base
        ratio = torch.linalg.matrix_norm(dense) / torch.linalg.matrix_norm(weight)
        assert against.relative_size == pytest.approx(float(ratio), rel=1e-4)
        u, _, vh = torch.linalg.svd(dense)
        along = torch.linalg.matrix_norm(u[:, :3].T @ weight @ vh[:3].T)
        assert against.amplification.along_change == pytest.approx(float(along), rel=1e-3)
        assert against.lost.keys() == {"bfloat16", "nf4"}


def test_a_planted_change_is_amplified_by_what_was_planted():
    net = nn.Sequential(nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(6))
    planted = LowRank(torch.eye(6, 2), torch.eye(2, 6), 21.5)
    adapter = Adapter(rw.LoRA(rank=2), {"0": SiteAdapter("linear", planted)}, ("0",))
    (site,) = measure(adapter, net)
    assert site.against_base.amplification.factor == pytest.approx(21.5)


def test_an_adapter_agrees_with_itself_and_chance_is_what_random_ones_do():
    def drawn(seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        sites = {
            f"{layer}.q": SiteAdapter(
                "linear",
                LowRank(torch.randn(64, 4, generator=generator), torch.randn(4, 96, generator=generator)),
            )
            for layer in range(24)
        }
        return Adapter(rw.LoRA(rank=4), sites, ("q",))

    one, two = drawn(0), drawn(1)
    same = torch.tensor(similarity("a", one, "a", one).by_module["q"])
    assert torch.allclose(same.diagonal(), torch.ones(4), atol=1e-5)
    (apart,) = similarities({"a": one, "b": two})
    assert apart.by_chance["q"] == pytest.approx(4 / 96)
    assert apart.by_module["q"][3][3] == pytest.approx(4 / 96, abs=0.012)  # 24 layers: ±0.004


def test_an_untrained_adapter_has_directions_and_no_change(tmp_path):
    net = rw.attach(model(), rw.LoRA(rank=3))
    rw.save(net, tmp_path / "start")
    start = read_adapter(tmp_path / "start")
    assert all(site.change == 0 and site.effective_rank == 0 for site in measure(start, rw.detach(net)))
    phi = similarity("start", start, "start", start).by_module["q_proj"]
    assert phi[2][2] == pytest.approx(1.0, abs=1e-5)
    render(Report("untrained", [AdapterPart("start", {}, measure(start, net))]))


def test_another_models_base_is_refused(trained):
    _, adapter = trained
    with pytest.raises(BaseMismatch, match=r"0\.down_proj"):
        measure(adapter, nn.Sequential(nn.Linear(12, 20)))


class Reader(HTMLParser):
    """Every tag closed, and every address in the page."""

    void = frozenset({"meta", "link", "br", "image"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def a_report(trained) -> Report:
    base, adapter = trained
    sites = measure(adapter, base)
    found = {site.name: Alignment(0.5, 2.0) for site in sites}
    part = AdapterPart(
        "a <b>", {"rank": "3"}, sites, [("PEFT", "yes", "")], {"x.safetensors": "ab"}, {"adamw": found, "sgd": found}
    )
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.9}, {"step": 2, "loss": 1.0}]
    return Report(
        title="a run & more",
        adapters=[part],
        headline={"rank": "3"},
        similarities=similarities({"start": adapter, "end": adapter}),
        runs={"run": history},
        over_run={0: {"adamw": found, "sgd": found}, 2: {"adamw": found, "sgd": found}},
        samples=[("<script>alert(1)</script>", "before", "after", "")],
        configuration="rank: 3",
        versions={"rankwise": "0"},
    )


def test_the_page_is_whole_and_needs_no_network(trained, tmp_path):
    path = write_report(a_report(trained), tmp_path / "page.html")
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.addresses
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    assert "@import" not in text and "url(http" not in text and "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "a &lt;b&gt;" in text
    figures = re.findall(r"<svg [^>]*", text)
    assert len(figures) >= 6
    assert all('role="img"' in each and "aria-label=" in each for each in figures)
    assert text.count("<figcaption>") == text.count("<figure")
    # Only the page's colours: what stands for them is gone.
    assert not re.search(r"#0(10203|40506|a010\d)", text)


def test_the_json_beside_it_holds_the_same_numbers(trained, tmp_path):
    report = a_report(trained)
    content = json.loads(write_report(report, tmp_path / "page.html").with_suffix(".json").read_text())
    site = content["adapters"][0]["sites"][0]
    assert site["change"] == report.adapters[0].sites[0].change
    assert content["similarities"][0]["by_module"]["q_proj"][0][0] == pytest.approx(1.0, abs=1e-5)
    assert content["over_run"]["2"]["sgd"]["0.q_proj"] == {"cosine": 0.5, "relative_size": 2.0}


def test_layers_of_one_name_are_told_apart():
    names = [
        f"encoder.layer.{i}.{rest}" for i in (0, 1) for rest in ("attention.output.dense", "output.dense", "query")
    ]
    labels = module_labels(names)
    assert len({(labels[name], name.split(".")[2]) for name in names}) == len(names)
    assert labels[names[0]] == labels[names[3]]
    both = module_labels(["encoder.block.0.q", "decoder.block.0.q"])
    assert set(both.values()) == {"encoder.block.*.q", "decoder.block.*.q"}
    assert module_labels([]) == {}


def test_names_are_text_and_no_formulas(trained):
    base, adapter = trained
    sites = measure(adapter, base)
    odd = "a $x^ & <b> $ _"
    found = similarities({odd: adapter, "other $": adapter})
    parts = [AdapterPart(name, {odd: odd}, sites) for name in (odd, "other $")]
    runs = {name: [{"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": 0.9}] for name in (odd, "other $")}
    text = render(Report(odd, parts, similarities=found, runs=runs))
    assert "a $x^ &amp; &lt;b&gt; $ _" in text
    assert "<b>" not in text
    assert "other $: held out, 0.900 at the end" in text


def test_what_is_infinite_is_no_number_in_json(trained, tmp_path):
    report = a_report(trained)
    object.__setattr__(report, "headline", {"loss": math.inf, "other": math.nan})
    text = write_report(report, tmp_path / "page.html").with_suffix(".json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["headline"] == {"loss": None, "other": None}


def test_a_drawing_as_a_file_of_its_own():
    drawing = svg("x", 'a "line"', (3, 2), lambda figure: figure.add_subplot().plot([0, 1], color="C0"))
    alone = standalone(drawing)
    assert "var(--" in drawing
    assert "var(--" not in alone
    assert 'xmlns="http://www.w3.org/2000/svg"' in alone
    assert "a &quot;line&quot;" in alone


def test_the_start_stays_the_start_while_training_goes_on():
    net = rw.attach(model(), rw.LoRA(rank=3))
    start = portable(net)
    before = {name: site.delta.A.clone() for name, site in start.sites.items()}
    with torch.no_grad():
        for pair in rw.pairs(net):
            for tensor in pair.parameters:
                tensor.normal_()
    assert all(torch.equal(site.delta.A, before[name]) for name, site in start.sites.items())
    (found,) = similarities({"start": start, "end": portable(net)})
    assert found.by_module["q_proj"][2][2] < 0.9


def test_a_start_without_directions_shows_no_similarity():
    net = rw.attach(model(), rw.LoRA(rank=3, init="init-b"))  # A = 0, B random
    assert similarity("start", portable(net), "start", portable(net)).by_module == {}


def test_sizes_beyond_fp32_are_numbers():
    huge = LowRank(torch.full((4, 1), 1e16), torch.full((1, 4), 1e16))  # its square is not one
    (site,) = measure(Adapter(rw.LoRA(rank=1), {"layers.²q": SiteAdapter("linear", huge)}, ("q",)))
    assert site.change == pytest.approx(4e32, rel=1e-5)
    assert site.layer is None


@pytest.mark.parametrize("name", ["page", "page.json", "file.html/page.html", "folder.html"])
def test_a_place_that_no_page_can_have_is_refused_before_any_work(tmp_path, name):
    (tmp_path / "file.html").write_text("")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RecipeError):
        check_place(tmp_path / name)
    check_place(tmp_path / "new" / "page.html")
