"""A run from a namespace of options, for those who call `understudy.training.dvi_rl.main` instead of the command."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pydantic

from understudy.assets import pocket_path
from understudy.core.errors import UserError
from understudy.core.explain import Given, explain
from understudy.target.loading import load_target
from understudy.training.dvi_rl.config import DviRlConfig
from understudy.training.dvi_rl.train import Trained, train

LOADING = ("model_name", "model", "dtype", "device")


def run_namespace(args: Namespace) -> Trained:
    """See `understudy.training.dvi_rl.main`."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    loading: dict[str, Any] = {name: given.pop(name) for name in LOADING if name in given}
    if unknown := sorted(given.keys() - DviRlConfig.model_fields.keys()):
        raise UserError(f"dvi_rl has no option {unknown[0]}; it has {', '.join((*LOADING, *DviRlConfig.model_fields))}")
    names = {loading.pop(name) for name in ("model_name", "model") if name in loading} or {"pocket"}
    if len(names) > 1:
        raise UserError("model_name and model are one option and have different values; give one")
    try:
        config = DviRlConfig(**given)
    except pydantic.ValidationError as error:
        raise UserError(explain(error, {name: Given(name, value) for name, value in given.items()})) from None
    (name,) = names
    target = load_target(
        pocket_path() if name == "pocket" else name,
        dtype=loading.get("dtype", "bfloat16"),
        device=loading.get("device"),
    )
    target.name = str(name)
    return train(config, target, print)[0]
