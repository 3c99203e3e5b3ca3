"""The engine: greedy answers are transformers' own, token for token; nothing leaks, whoever fails or vanishes."""

import queue
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import OPTIONS, alone, base_model, save_base_and_adapters, service_of, until

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import (
    AdapterTooLarge,
    AnswerFailed,
    BaseMismatch,
    CheckpointError,
    Overloaded,
    RankwiseError,
    RequestError,
    ServerStopping,
    ShapeMismatch,
    UnknownModel,
    UnsupportedAdapter,
)
from rankwise.serve.adapter_store import check_confined, check_directory, named_directories
from rankwise.serve.engine import Generation
from rankwise.serve.sampling import Sampling

COUNT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_base_and_adapters(path, COUNT)
    return path


@pytest.fixture
def service(folder):
    service = service_of(folder)
    yield service
    service.engine.close()


@pytest.fixture
def engine(service, folder):
    for number in range(COUNT):
        add(service.engine, folder, f"a{number}")
    return service.engine


@pytest.fixture
def endless(engine):
    """An engine that no token stops, so that answers are as long as they may be."""
    engine._ends.clear()
    return engine


def add(engine, folder: Path, name: str, directory: Path | None = None) -> None:
    engine.call(lambda: engine.store.add(name, directory or folder / "adapters" / name)).result(60)


class Asked:
    """A generation whose pieces are kept."""

    def __init__(self, engine, prompt, name="base", **sampling):
        self.events = queue.Queue()
        settings = Sampling(**{"max_tokens": 10, **sampling})
        self.generation = Generation(prompt, settings, engine.store.find(name), self.events.put)

    def pieces(self):
        pieces = []
        while not pieces or pieces[-1].finish_reason is None:
            event = self.events.get(timeout=60)
            if isinstance(event, RankwiseError):
                raise event
            pieces.append(event)
        return pieces

    def tokens(self) -> list[int]:
        return [piece.token for piece in self.pieces()]


def ask(engine, *args, **sampling) -> Asked:
    asked = Asked(engine, *args, **sampling)
    engine.submit([asked.generation])
    return asked


def is_idle(engine) -> bool:
    return not engine.running and not engine.waiting and all(a.users == 0 for a in engine.store.adapters.values())


def held(engine) -> int:
    """Slots on the model."""
    adapted = Adapted.find(engine.model)
    return 0 if adapted is None else len(adapted.specs)


def test_greedy_answers_are_transformers_own(engine, folder):
    """Twenty requests at unequal times, over five adapters of which three fit into memory, and the base."""
    draws = random.Random(0)
    model = base_model(folder)
    names = ["base", *(f"a{number}" for number in range(COUNT))]
    asked = []
    for number in range(20):
        prompt = [draws.randrange(4, 200) for _ in range(draws.randint(1, 20))]
        name, length = draws.choice(names), draws.randint(1, 24)
        asked.append((name, prompt, length, Asked(engine, prompt, name, max_tokens=length)))
        assert until(lambda: len(engine.waiting) < OPTIONS.max_waiting)
        engine.submit([asked[-1][-1].generation])
        if number % 7 == 0:
            assert until(lambda: not engine.waiting)
    said = set()
    for name, prompt, length, answer in asked:
        adapter = None if name == "base" else folder / "adapters" / name
        expected = alone(model, adapter, prompt, length)
        assert answer.tokens() == expected, (name, prompt)
        said.add(tuple(expected[:3]))
    assert len(said) > 8, "the answers are too alike to show anything"
    assert until(lambda: is_idle(engine))
    assert held(engine) == len(engine.store.loaded) <= OPTIONS.max_adapters


def test_finish_reasons_and_counts(endless):
    (*_, last) = pieces = ask(endless, [5, 6, 7], max_tokens=5).pieces()
    assert last.finish_reason == "length" and len(pieces) == 5
    whole = "".join(piece.text for piece in pieces)
    assert len(whole) > 1
    stopped = ask(endless, [5, 6, 7], max_tokens=5, stop=(whole[1],)).pieces()
    assert stopped[-1].finish_reason == "stop"
    assert "".join(piece.text for piece in stopped) == whole[: whole.index(whole[1])]


def test_an_end_token_ends_an_answer(engine, folder):
    tokens = ask(engine, [5, 6, 7], "a0").tokens()
    end = next(token for token in tokens if token != tokens[0])
    engine._ends.add(end)
    (*_, last) = pieces = ask(engine, [5, 6, 7], "a0").pieces()
    assert last.finish_reason == "stop" and last.text == ""
    assert [piece.token for piece in pieces] == tokens[: tokens.index(end) + 1]


def test_a_seed_gives_the_same_draws_in_any_company(engine):
    def drawn():
        return ask(engine, [9, 8], "a1", temperature=1.0, seed=11, max_tokens=12)

    first = drawn().tokens()
    crowd = [ask(engine, [number, 4], f"a{number % 3}", max_tokens=20) for number in range(4, 9)]
    assert drawn().tokens() == first
    assert all(len(one.tokens()) <= 20 for one in crowd)


def test_logprobs_are_the_model_s(engine, folder):
    (piece,) = ask(engine, [5, 6, 7], "a2", max_tokens=1, logprobs=3).pieces()
    model = rw.load(base_model(folder), folder / "adapters/a2")
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(0)
    assert piece.logprobs.logprob == pytest.approx(float(expected.max()), abs=1e-5)
    assert [token for token, _ in piece.logprobs.top] == expected.topk(3).indices.tolist()


def test_who_vanishes_frees_the_row(endless):
    asked = [ask(endless, [5, 6], f"a{number % 3}", max_tokens=60) for number in range(12)]
    assert until(lambda: len(endless.running) == OPTIONS.max_batch and endless.waiting)
    for one in asked[OPTIONS.max_batch :]:
        one.generation.cancelled = True
    assert until(lambda: not endless.waiting), "a place in the queue is free although the batch is full"
    for one in asked:
        one.generation.cancelled = True
    assert until(lambda: is_idle(endless))
    assert endless._batch is None
    assert ask(endless, [5, 6]).tokens(), "others are answered as before"


def test_a_row_that_cannot_go_on_fails_alone(endless, monkeypatch):
    def broken(*_):
        raise OverflowError("no such token")

    others = ask(endless, [5, 6], "a0", max_tokens=30)
    monkeypatch.setattr("rankwise.serve.engine.draw", broken)
    with pytest.raises(AnswerFailed, match="no such token"):
        ask(endless, [5, 6], "a0", temperature=1.0).tokens()
    assert len(others.tokens()) == 30
    assert until(lambda: is_idle(endless))


def test_too_many_are_refused_at_once(engine):
    asked = [Asked(engine, [5, 6], max_tokens=1) for _ in range(OPTIONS.max_waiting + 1)]
    with pytest.raises(Overloaded, match="--max-waiting"):
        engine.submit([one.generation for one in asked])
    assert until(lambda: is_idle(engine))


def test_an_adapter_that_says_nothing_finite_fails_alone(endless, folder, tmp_path):
    source = folder / "adapters/a0"
    huge = tmp_path / "huge"
    huge.mkdir()
    for file in source.iterdir():
        (huge / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor * 1e30 for name, tensor in load_file(source / "adapter_model.safetensors").items()}
    save_file(tensors, huge / "adapter_model.safetensors")
    check_directory(huge)
    add(endless, folder, "huge", huge)
    before = ask(endless, [5, 6, 7], "a1", max_tokens=30)
    with pytest.raises(AnswerFailed, match="not finite"):
        ask(endless, [5, 6, 7], "huge").tokens()
    assert len(before.tokens()) == 30
    assert until(lambda: is_idle(endless))


def test_a_model_that_fails_fails_those_under_way_only(endless, monkeypatch):
    def broken(*_):
        raise MemoryError("no room for the cache")

    first = ask(endless, [5, 6], "a0", max_tokens=60)
    assert until(lambda: endless.running)
    monkeypatch.setattr("rankwise.serve.engine.step", broken)
    with pytest.raises(AnswerFailed, match="no room for the cache"):
        first.tokens()
    monkeypatch.undo()
    assert until(lambda: is_idle(endless))
    monkeypatch.setattr("rankwise.serve.engine.prefill", broken)
    with pytest.raises(AnswerFailed, match="no room for the cache"):
        ask(endless, [5, 6], "a0").tokens()
    monkeypatch.undo()
    assert len(ask(endless, [5, 6], "a0").tokens()) == 10


def test_closing_tells_everybody(service):
    engine = service.engine
    asked = [ask(engine, [5, 6], max_tokens=60) for _ in range(12)]
    engine.close()
    for one in asked:
        with pytest.raises(ServerStopping):
            one.tokens()
    with pytest.raises(ServerStopping):
        ask(engine, [5, 6])
    assert not engine.alive


# The store.


def test_the_longest_unused_leaves_and_those_in_use_stay(endless):
    assert [adapter.name for adapter in endless.store.loaded] == ["a2", "a3", "a4"]
    running = ask(endless, [5, 6], "a2", max_tokens=60)
    assert until(lambda: endless.running)
    for name in ("a0", "a1", "a3"):
        ask(endless, [5, 6], name, max_tokens=1).tokens()
    assert {adapter.name for adapter in endless.store.loaded} == {"a2", "a1", "a3"}
    assert len(running.tokens()) == 60


def test_more_adapters_than_fit_take_turns(engine, folder):
    """Requests for all at once, three in memory: none fails, none is answered by another's."""
    asked = {name: ask(engine, [7, 8, 9], name) for name in (f"a{number}" for number in range(COUNT))}
    model = base_model(folder)
    for name, one in asked.items():
        assert one.tokens() == alone(model, folder / "adapters" / name, [7, 8, 9], 10)
    assert until(lambda: is_idle(engine))


def test_an_adapter_that_is_unloaded_answers_to_the_end(endless, folder):
    expected = ask(endless, [5, 6], "a4", max_tokens=60).tokens()
    running = ask(endless, [5, 6], "a4", max_tokens=60)
    assert until(lambda: endless.running)
    adapter = endless.store.find("a4")
    endless.call(lambda: endless.store.retire("a4")).result(60)
    with pytest.raises(UnknownModel, match="a4"):
        endless.store.find("a4")
    add(endless, folder, "a4", folder / "adapters/a0")
    assert running.tokens() == expected
    assert until(lambda: adapter.slot is None)
    assert adapter not in endless.store.loaded
    assert ask(endless, [5, 6], "a4", max_tokens=60).tokens() == ask(endless, [5, 6], "a0", max_tokens=60).tokens()


def test_loading_and_unloading_leaves_nothing(service, folder):
    engine = service.engine
    weights = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    for number in range(3 * COUNT):
        name = f"a{number % COUNT}"
        add(engine, folder, name)
        ask(engine, [5, 6], name, max_tokens=2).tokens()
        engine.call(lambda name=name: engine.store.retire(name)).result(60)
    assert until(lambda: held(engine) == 0)
    after = engine.model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


def refusal(engine, folder, path: Path) -> RankwiseError:
    """The error of an adapter, while others are answered as before."""
    others = ask(engine, [5, 6, 7], "a1", max_tokens=30)
    with pytest.raises(RankwiseError) as error:
        check_directory(path)
        add(engine, folder, "refused", path)
    assert others.tokens()
    assert "refused" not in engine.store.adapters
    assert held(engine) == len(engine.store.loaded)
    return error.value


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_broken_adapter_is_refused(engine, folder, tmp_path):
    path = copied(folder / "adapters/a0", tmp_path / "broken")
    tensors = path / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    error = refusal(engine, folder, path)
    assert isinstance(error, CheckpointError) and "adapter_model.safetensors" in str(error)


def test_a_foreign_adapter_is_refused(engine, folder, tmp_path):
    from served import save_adapter

    other = base_model(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape))
    save_adapter(other, tmp_path / "foreign", 1)
    assert isinstance(refusal(engine, folder, tmp_path / "foreign"), BaseMismatch)
    path = copied(folder / "adapters/a0", tmp_path / "wide")
    tensors = load_file(path / "adapter_model.safetensors")
    wide = {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}
    save_file(wide, path / "adapter_model.safetensors")
    assert isinstance(refusal(engine, folder, path), ShapeMismatch)


def test_a_classifier_is_refused(engine, folder, tmp_path):
    path = copied(folder / "adapters/a0", tmp_path / "classifier")
    (path / "labels.json").write_text('["good", "bad"]')
    assert isinstance(refusal(engine, folder, path), UnsupportedAdapter)


def test_too_large_an_adapter_is_refused(folder):
    engine = service_of(folder).engine
    add(engine, folder, "a0")
    engine.store.max_bytes = int(2.2 * engine.store.loaded[0].size)
    add(engine, folder, "a1")  # of one rank more
    assert [adapter.name for adapter in engine.store.loaded] == ["a1"], "two do not fit together"
    engine.store.max_bytes = engine.store.loaded[0].size - 1
    with pytest.raises(AdapterTooLarge, match="--adapter-memory"):
        add(engine, folder, "a2")
    engine.close()


def test_no_room_is_said_when_all_are_in_use(endless, folder, tmp_path):
    running = [ask(endless, [5, 6], f"a{number}", max_tokens=60) for number in range(3)]
    assert until(lambda: len(endless.running) == 3)
    with pytest.raises(Overloaded, match="--max-adapters"):
        add(endless, folder, "another", folder / "adapters/a4")
    assert all(len(one.tokens()) == 60 for one in running)


@pytest.mark.parametrize("name", ["", "base", "a0", "a\nb", "x" * 300])
def test_names_that_cannot_be_served(engine, folder, name):
    with pytest.raises(RequestError, match="lora_name"):
        add(engine, folder, name, folder / "adapters/a1")


def test_directories_as_they_are_typed(folder, tmp_path):
    adapters = folder / "adapters"
    assert dict(named_directories([str(adapters)])) == {f"a{n}": adapters / f"a{n}" for n in range(COUNT)}
    assert dict(named_directories([f"x={adapters}/a0", f"{adapters}/a1"])) == {
        "x": adapters / "a0",
        "a1": adapters / "a1",
    }
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such directory"),
        ([f"{adapters}/a0", f"a0={adapters}/a1"], "'a0'"),
        ([f"x={adapters}"], "one name for 5 adapters"),
    ):
        with pytest.raises(RequestError, match=message):
            dict(named_directories(arguments))


def test_only_below_the_given_directories(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder / "adapters/a0")
    check_confined(tmp_path / "link", [folder / "adapters"])
    (folder / "out").symlink_to(tmp_path)
    for path in (folder / "out/x", folder / "adapters/../base", Path("/"), Path("adapters/a0")):
        with pytest.raises(RequestError, match="--load-from-anywhere"):
            check_confined(path, [folder / "adapters"])
