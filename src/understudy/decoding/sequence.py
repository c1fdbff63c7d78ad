"""One sequence being decoded: its state in the target and in the drafter, its law, its stops. The loop itself is in `engine`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from understudy.core.errors import UserError
from understudy.core.records import Budget, Commit, Rows
from understudy.core.seeds import generator
from understudy.decoding.adaptive import AdaptiveLength, DraftLength, FixedLength
from understudy.decoding.listeners import Listener, united_needs
from understudy.decoding.request import DecodeParams
from understudy.decoding.sampler import Chooser, RecordingSampler
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter, DraftSession
from understudy.target.params import SamplingParams
from understudy.target.probe import probe
from understudy.target.processors import Processors
from understudy.target.session import TargetSession
from understudy.target.target import Target
from understudy.telemetry.stopwatch import Stopwatch


class DecodeSequence:
    """Prefill a prompt, then iterate `engine.decode(sequence)`. A second `prefill` continues the same conversation.

    `index` distinguishes the random streams of several sequences with one seed.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        params: DecodeParams = DecodeParams(),
        sampling: SamplingParams = SamplingParams(),
        stop: StopRule | None = None,
        listeners: Iterable[Listener] = (),
        index: int = 0,
    ) -> None:
        self.model, self.drafter_model = target, drafter
        self.params, self.sampling, self.index = params, sampling, index
        self.stop = StopRule(target.eos_ids) if stop is None else stop
        self.listeners = tuple(listeners)
        needs = united_needs(drafter.needs, self.listeners)
        if needs.exit is not None:
            probe(target, "split", needs.exit)
        if drafter.nodes is not None:
            probe(target, "tree")
        self.target = TargetSession(target, needs)
        self.draft: DraftSession = drafter.session(self.target)
        self._make_own()
        self.prefill_seconds: dict[str, float] = {}  # of this turn's prompt passes, by section; counted with cycle 0
        self.cycles = 0  # of this turn, so far
        self.prompt = 0  # tokens before the output of this turn
        self.pending: Rows | None = None  # the last prompt rows, run but not yet committed
        self.finished: str | None = None  # "stop" or "length" once the turn has ended

    def _make_own(self) -> None:
        """What no two sequences share: random streams, draft length, stopwatch."""
        steps = self.drafter_model.steps if self.params.steps is None else self.params.steps
        self.length: DraftLength = AdaptiveLength(steps) if self.params.adaptive else FixedLength(steps)
        self.watch = Stopwatch(self.model.device, self.params.detailed_timing)
        processors = Processors(self.sampling, self.model.vocab_size, sorted(self.stop.ids), self.model.device)
        self.chooser = Chooser(processors, self.model.device, self.sampling.seed, self.index)
        random = generator(self.model.device, self.sampling.seed, self.index, "draft")
        tree = self.drafter_model.static_tree
        # a tree whose shape follows from what was drawn would bias rejection: such drafters are matched
        sample = self.params.draft_sampling == "sample" and (self.drafter_model.nodes is None or tree)
        self.recorder = RecordingSampler(processors, random, sample, tree)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output so far."""
        return self.target.tokens

    @property
    def output(self) -> list[int]:
        """New tokens of this turn."""
        return self.target.tokens[self.prompt :]

    @property
    def room(self) -> int:
        """New tokens that this turn may still get."""
        made = len(self.tokens) - self.prompt
        return min(self.params.max_new_tokens - made, self.model.context - len(self.tokens))

    def prefill(self, prompt: Sequence[int]) -> None:
        """Run `prompt` after what is there, in chunks. The first new token is chosen by the first cycle of `decode`."""
        if not prompt:
            raise UserError("the prompt is empty")
        if self.pending is not None:
            raise UserError("this sequence is prefilled and waits to be decoded")
        total = len(self.tokens) + len(prompt)
        if total >= self.model.context:
            raise UserError(
                f"the prompt has {total} tokens, the model's context is {self.model.context}: shorten the prompt"
            )
        self.watch.start()
        before = len(self.tokens)
        try:
            self._run_prompt(prompt, total)
        except BaseException:
            self.rewind(before)
            raise
        self.prompt, self.finished, self.cycles = len(self.tokens), None, 0
        self.chooser.begin(self.tokens)
        self.watch.lap("verify")
        self.prefill_seconds = self.watch.stop()

    def _run_prompt(self, prompt: Sequence[int], total: int) -> None:
        """All chunks; the last one waits in `pending`, with its tokens in the text."""
        self.target.cache.reserve(min(total + self.params.max_new_tokens, self.model.context) + self._widest())
        todo = [*self.tokens[-1:], *prompt]
        if not self.tokens:
            self.tokens.append(todo[0])
        chunk = self.params.prefill_chunk
        with torch.inference_mode():
            for start in range(0, len(todo), chunk):
                part = todo[start : start + chunk]
                end = start + len(part)
                rows = self.target.prefill(part, want_logits=end == len(todo))
                if end < len(todo):
                    self.commit(rows, range(len(part)), [*part[1:], todo[end]])
                else:
                    self.tokens.extend(part[1:])
                    self.pending = rows

    def _widest(self) -> int:
        nodes = self.drafter_model.nodes
        return max(min(self.length.steps, self.params.max_new_tokens), nodes or 0) + 1

    def budget(self) -> Budget:
        """Drafts worth making now: the last token of a turn is always the target's own."""
        depth = max(0, min(self.length.depth(), self.room - 1))
        return Budget(depth, self.drafter_model.nodes or depth)

    def commit(self, rows: Rows, path: Sequence[int], new: list[int], stopped: bool = False) -> None:
        """Make the rows on `path` and the tokens `new` part of the text, everywhere."""
        self.target.commit(rows, path, new)
        self.draft.observe(Commit(rows, path, new[-1], stopped))

    def rewind(self, tokens: int) -> None:
        """Go back to the first `tokens` tokens of the text, in the target and in the drafter. The turn is open again."""
        if (rows := self.pending) is not None:  # run, but not yet committed: the drafter has to see them to keep them
            self.pending = None
            self.target.length = rows.start + rows.width
            with torch.inference_mode():
                self.draft.observe(Commit(rows, range(rows.width), self.tokens[-1], False))
        self.target.rewind(tokens)
        self.draft.rewind(tokens)
        self.prompt, self.finished, self.pending = min(self.prompt, tokens), None, None
        if self.chooser.history is not None and self.output:
            self.chooser.history.truncate(len(self.output))
        else:
            self.chooser.begin(self.tokens)

    def fork(self, index: int) -> DecodeSequence:
        """Another sequence that continues from here with random streams of its own: several samples from one prefill."""
        copy = DecodeSequence.__new__(DecodeSequence)
        copy.__dict__.update(self.__dict__)
        copy.index = index
        copy.target = self.target.fork()
        copy.draft = self.draft.fork(copy.target)
        copy._make_own()
        if self.chooser.history is not None:
            copy.chooser.history = self.chooser.history.fork()
        copy.prefill_seconds = {}  # the prompt was run once, by the sequence that was forked
        return copy
