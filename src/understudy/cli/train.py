"""`understudy train`: a command per method."""

from __future__ import annotations

from understudy.cli import LazyGroup

TRAINERS = {  # name -> (module, one line of help)
    "kangaroo": (
        "understudy.cli.train_kangaroo",
        "Kangaroo's adapter, offline: an attention block between exit and head.",
    ),
    "eagle3": ("understudy.cli.train_eagle3", "EAGLE-3: a layer of its own on three hidden states of the target."),
    "dflash": ("understudy.cli.train_dflash", "DFlash: a few layers that fill in a whole block of drafts in one pass."),
    "dvi": ("understudy.cli.train_dvi", "A draft head that learns from accepts and rejects, online or by rollouts."),
    "dvi-rl": ("understudy.cli.train_dvi_rl", "DVI-RL: reinforcement learning on two LoRAs."),
}

command = LazyGroup(TRAINERS, name="train", help="Train a drafter.", no_args_is_help=True)
