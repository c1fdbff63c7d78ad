"""The measuring itself: all modes answer all prompts, in turns, several times over.

Prompt by prompt, A B C then B C A then C A B: what the machine does meanwhile (heat, other processes) falls on every mode alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from understudy.bench.modes import Mode, Turn

WARM_TOKENS = 24  # new tokens of a warm-up turn
Turns = list[list[Turn]]  # [repeat][prompt]


def order(modes: int, prompts: int, repeats: int) -> Iterator[tuple[int, int, int]]:
    """(repeat, prompt, mode) in the order of running. The mode that goes first moves on with every prompt and repeat."""
    for repeat in range(repeats):
        for prompt in range(prompts):
            for turn in range(modes):
                yield repeat, prompt, (turn + prompt + repeat) % modes


def warm_up(modes: Sequence[Mode], prompts: Sequence[list[int]], limit: int) -> None:
    """Every mode once on the longest prompt and once on the first: kernels, masks and stages are made before the clock runs."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    for index in (longest, 0):
        for mode in modes:
            mode.turn(prompts[index], index, min(limit, WARM_TOKENS))


def measure(
    modes: Sequence[Mode],
    prompts: Sequence[list[int]],
    limit: int,
    repeats: int,
    seen: Callable[[Mode, int, int, Turn], None] = lambda mode, repeat, prompt, turn: None,
) -> dict[str, Turns]:
    """Turns per mode, [repeat][prompt]. `seen(mode, repeat, prompt, turn)` is called after each, outside its time."""
    turns: dict[str, Turns] = {mode.name: [[] for _ in range(repeats)] for mode in modes}
    begun = -1
    for repeat, prompt, which in order(len(modes), len(prompts), repeats):
        if repeat != begun:
            begun = repeat
            for mode in modes:
                mode.begin()
        mode = modes[which]
        turn = mode.turn(prompts[prompt], prompt, limit)
        turns[mode.name][repeat].append(turn)
        seen(mode, repeat, prompt, turn)
    return turns
