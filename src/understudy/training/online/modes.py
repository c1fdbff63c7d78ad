"""The six ablations of DVI: which losses a head learns from. The cadence, the buffer and the optimizer are the same in all.

By default KD gives way to cross-entropy, policy gradient and reverse KL as the schedule runs. Where KD is the only loss that says
something about every token of the law, it stays constant: else `kd_only` would learn nothing after its ramp. For the same reason
`pg_only` has no warm-up, through which its one loss would weigh nothing.
"""

from __future__ import annotations

from typing import Any

_OFF: dict[str, Any] = {
    "dvi_kd_lambda0": 0.0,
    "dvi_kd_lambdamin": 0.0,
    "dvi_ce_lambda": 0.0,
    "dvi_pg_lambda_max": 0.0,
    "dvi_kl_lambda0": 0.0,
    "dvi_kl_lambdamin": 0.0,
    "dvi_entropy_weight": 0.0,
}
_KD: dict[str, Any] = {"dvi_kd_lambda0": 0.5, "dvi_kd_lambdamin": 0.5}
_CE: dict[str, Any] = {"dvi_ce_lambda": 0.5}
_PG: dict[str, Any] = {"dvi_pg_lambda_max": 0.2}

# Mode -> overrides of `drafting.learning.LearnOptions`
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "kd_only": _OFF | _KD,
    "ce_only": _OFF | _CE,
    "pg_only": _OFF | _PG | {"dvi_warmup_steps": 0},
    "kd+ce": _OFF | _KD | _CE,
    "kd+pg": _OFF | _KD | _PG,
}
