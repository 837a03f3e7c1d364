"""What goes wrong costs one request, or one step: NaN, a step that fails, readers that stop or never read."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.engine.request import Request
from backend.engine.worker import Worker
from backend.errors import BusyError, EngineError, SamplingError
from backend.params import GenerationParams
from backend.runtime import Runtime
from backend.waiting import WaitingLine
from tests.api_server import wait_for
from tests.guesses import Told
from tests.real import read, tiny_runtime
from tests.tiny import TinyModel, write_tiny

DRAWN = GenerationParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=40, seed=3, ignore_eos=True)
GREEDY = GenerationParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = [list(range(3, 60)), [7, 8, 9] * 12, list(range(100, 110))]


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    runtime = tiny_runtime(write_tiny(tmp_path / "tiny.gguf", TinyModel(tied=False)), weights="f32", kv_tokens=2048)
    runtime._engine.speculation = None
    yield runtime
    runtime.close(drain=False)


class Between:
    """Stands between the engine and its runner, and does something to one step."""

    def __init__(self, runtime: Runtime) -> None:
        self._run = runtime.runner.run
        runtime.runner.run = self.run  # type: ignore[method-assign]

    def run(self, work):
        return self.after(work, self._run(work))

    def after(self, work, logits):
        return logits


class Poison(Between):
    """A row of one request becomes NaN or Inf: in the middle of guesses that are checked, or at a prompt's end."""

    def __init__(self, runtime: Runtime, prompt: list[int], value: float, *, guessing: bool) -> None:
        super().__init__(runtime)
        self.prompt, self.value, self.guessing, self.done = tuple(prompt), value, guessing, False

    def after(self, work, logits):
        row, logits = 0, logits.clone()  # the step's own may not be written to
        for item in work:
            meant = item.request.prompt == self.prompt and (len(item.drafts) > 1 if self.guessing else item.draws)
            if meant and not self.done and item.logit_rows:
                self.done = True
                logits[row + item.logit_rows // 2, 5] = self.value
            row += item.logit_rows
        return logits


@pytest.mark.parametrize("guessing", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_ends_that_request_only(runtime: Runtime, value: float, guessing: bool) -> None:
    expected = [read(runtime.start(ids, GREEDY, use_cache=False))[1] for ids in PROMPTS]
    if guessing:
        runtime._engine.speculation = Told(
            {(tuple(ids), GREEDY): said for ids, said in zip(PROMPTS, expected)}, wrong_at=1000
        )
    poison = Poison(runtime, PROMPTS[1], value, guessing=guessing)
    ends = [read(reply) for reply in [runtime.start(ids, GREEDY) for ids in PROMPTS]]
    assert poison.done
    assert [last.finish_reason for _, _, last in ends] == ["length", "error", "length"]
    assert [ends[0][1], ends[2][1]] == [expected[0], expected[2]]
    assert ends[1][2].error.code == "numerical_error"
    assert ends[1][1] == expected[1][: len(ends[1][1])], "what was said before it stands"
    assert runtime.blocks.in_use == 0
    assert read(runtime.start(PROMPTS[1], GREEDY))[1] == expected[1], "and nothing of it is found again"


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


def test_the_end_is_told_whatever_fails_on_the_way(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = runtime._engine
    with monkeypatch.context() as patch:
        patch.setattr(engine._pairs, "forget", broken)
        _, ids, last = read(runtime.start(PROMPTS[0], GREEDY))
    assert len(ids) == 40
    assert isinstance(last.error, EngineError)
    told: list[object] = []

    class Listener:
        def on_token(self, *_: object, **__: object) -> bool:
            raise RuntimeError("a broken listener")

        def on_finish(self, reason: object, error: Exception | None = None) -> None:
            told.append(error)

    with monkeypatch.context() as patch:
        patch.setattr("backend.sampling.sampler.Sampler.held", property(lambda _: 1))
        request = Request(tuple(PROMPTS[1]), GREEDY, frozenset(), Listener(), 256)  # type: ignore[arg-type]
        runtime.worker.submit(request)
        wait_for(lambda: told)
    assert [type(error) for error in told] == [EngineError]
    assert len(read(runtime.start(PROMPTS[2], GREEDY))[1]) == 40
    assert runtime.blocks.in_use == 0


def test_a_step_that_fails_before_anybody_runs_is_told_to_who_waits(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runtime.blocks, "acquire", broken)
        for reply in [runtime.start(prompt, GREEDY) for prompt in PROMPTS]:
            assert isinstance(read(reply)[2].error, EngineError)
    assert len(read(runtime.start(PROMPTS[0], GREEDY))[1]) == 40


def test_nobody_waits_for_a_thread_that_has_ended(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime._engine, "_fail_all", broken)
    monkeypatch.setattr(runtime.runner, "run", broken)
    reply = runtime.start(PROMPTS[0], GREEDY)
    assert isinstance(read(reply)[2].error, EngineError)
    runtime.worker._thread.join(5)
    for ask in (lambda: runtime.start(PROMPTS[1], GREEDY), lambda: runtime.worker.ask(lambda: 1)):
        with pytest.raises(EngineError, match="load the preset again"):
            ask()


def test_closed_twice_at_once_it_is_cleaned_up_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[float] = []

    def keep() -> int:
        time.sleep(0.1)
        kept.append(runtime.weight_bytes)
        return 0

    monkeypatch.setattr(runtime._keeper, "keep", keep)
    threads = [threading.Thread(target=runtime.close, kwargs={"drain": drain}) for drain in (True, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(kept) == 1


def test_a_mistake_of_one_request_leaves_what_others_share(runtime: Runtime) -> None:
    """Only a number that is none says that what was read is wrong."""
    preface = list(range(3, 67))
    read(runtime.start([*preface, 5], GREEDY))
    biases = {str(token): -100 for token in range(runtime.tokenizer.vocab_size)}
    _, _, last = read(runtime.start([*preface, 6], GenerationParams.from_mapping({"logit_bias": biases})))
    assert isinstance(last.error, SamplingError)
    _, _, last = read(runtime.start([*preface, 7], GREEDY))
    assert last.stats.cached_tokens == len(preface)


def test_a_poisoned_token_in_the_middle_of_a_prompt(runtime: Runtime) -> None:
    """Its keys and values are NaN, and so is all that looks at them; other sequences never do."""
    weight = runtime.runner.model.embedding.table
    kept = weight[200].clone()
    weight[200] = float("nan")
    sick = [*range(3, 150), 200, *range(3, 90)]
    params = GenerationParams.from_mapping({"logit_bias": {"200": -100}}, DRAWN)  # the others do not say it either
    ends = [read(reply)[2] for reply in [runtime.start(ids, params) for ids in (PROMPTS[0], sick, PROMPTS[2])]]
    assert [end.finish_reason for end in ends] == ["length", "error", "length"]
    weight[200] = kept
    assert read(runtime.start(sick, DRAWN))[2].finish_reason == "length"


def test_a_step_that_fails_is_told_to_all_and_the_next_request_works(runtime: Runtime) -> None:
    expected = read(runtime.start(PROMPTS[0], DRAWN, use_cache=False))[1]

    class Failing(Between):
        steps = 0

        def after(self, work, logits):
            self.steps += 1
            if self.steps == 4:
                raise RuntimeError("broken")
            return logits

    Failing(runtime)
    ends = [read(reply)[2] for reply in [runtime.start(ids, DRAWN) for ids in PROMPTS]]
    assert {end.error.code for end in ends} == {"engine_error"}
    assert runtime.blocks.in_use == runtime.blocks.cached == 0
    assert read(runtime.start(PROMPTS[0], DRAWN))[1] == expected


def test_stopping_frees_the_blocks_within_one_step(runtime: Runtime) -> None:
    class Counting(Between):
        steps = 0

        def after(self, work, logits):
            self.steps += 1
            time.sleep(0.005)
            return logits

    counting = Counting(runtime)
    for tokens in (0, 1, 3, 9):
        reply = runtime.start(list(range(3, 250)), DRAWN)
        wait_for(lambda: reply.stats.completion_tokens >= tokens and reply.stats.phase != "queued")
        before = counting.steps
        reply.stop()
        wait_for(lambda: reply.finished)
        assert counting.steps <= before + 2, "the step that was being computed, and no other begins"
        assert runtime.blocks.in_use == 0


def test_who_never_reads_keeps_nobody_waiting_and_little_memory(runtime: Runtime) -> None:
    """The engine writes on; what waits for a reader is no more than the reply, which the context bounds."""
    unread = [runtime.start(ids, GREEDY, top_logprobs=20) for ids in PROMPTS]
    assert read(runtime.start(PROMPTS[0], DRAWN))[2].finish_reason == "length"
    wait_for(lambda: all(reply.finished for reply in unread), 20)
    assert runtime.worker.idle
    assert runtime.blocks.in_use == 0
    for reply in unread:
        assert len(reply._ids) == len(reply._top_logprobs) == 40
        assert sum(map(sys.getsizeof, (reply._ids, reply._pieces, reply._logprobs, *reply._top_logprobs))) < 50_000
        text, ids, last = read(reply)
        assert (len(ids), last.finish_reason) == (40, "length"), "and all of it is still there"


# a line of bounded length --------------------------------------------------------------------------------------------


class Stuck:
    """An engine that takes nothing out of its inbox: its first step does not return."""

    def __init__(self) -> None:
        self.go, self.scheduler = threading.Event(), self
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.idle = True

    def submit(self, request: Request) -> None:
        self.idle = False
        self.waiting.append(request)

    def step(self) -> None:
        self.go.wait(10)
        self.waiting.clear()
        self.idle = True

    def fail_all(self, error: Exception) -> None: ...


def asked(person: str) -> Request:
    return Request((1,), GenerationParams(), frozenset(), None, 10, person=person)  # type: ignore[arg-type]


def test_the_line_is_bounded_and_its_end_is_kept_for_others() -> None:
    engine = Stuck()
    worker = Worker(engine, max_waiting=8)  # type: ignore[arg-type]
    for _ in range(6):
        worker.submit(asked("a"))
    with pytest.raises(BusyError, match="6 requests are waiting"):
        worker.submit(asked("a"))
    worker.submit(asked("b"))
    with pytest.raises(BusyError):
        worker.submit(asked("b"))
    worker.submit(asked("c"))
    with pytest.raises(BusyError):
        worker.submit(asked("d"))
    engine.go.set()
    worker.close(drain=True)


def test_who_waits_for_a_model_can_be_stopped_as_soon_as_it_is_in_the_line() -> None:
    """The line may be served before `add` has returned."""

    class Watched(list):  # type: ignore[type-arg]
        def append(self, waiting) -> None:  # type: ignore[no-untyped-def]
            assert waiting.generation.id == waiting.id, "what stops it is known"
            super().append(waiting)

    line = WaitingLine(4)
    line._line = Watched()
    generation = line.add(lambda runtime, generation: None)
    generation.stop()
    assert len(line) == 0


def test_programs_that_nobody_tells_apart_have_the_whole_line() -> None:
    engine = Stuck()
    worker = Worker(engine, max_waiting=8)  # type: ignore[arg-type]
    for _ in range(8):
        worker.submit(asked(""))
    with pytest.raises(BusyError):
        worker.submit(asked(""))
    engine.go.set()
    worker.close(drain=True)
