"""Learning while decoding (DVI): a listener that turns cycles into samples, and samples into steps of the draft head."""

from understudy.drafting.lora import load_lora_state_dict, lora_state_dict
from understudy.training.online.buffer import DVIRingBuffer, DVITrainSample
from understudy.training.online.checkpoints import load_ckpt, save_ckpt
from understudy.training.online.learner import OnlineLearner, learner_of
from understudy.training.online.modes import MODES
from understudy.training.online.schedule import PiecewiseSchedule
from understudy.training.online.trainer import OnlineTrainer

__all__ = [
    "MODES",
    "DVIRingBuffer",
    "DVITrainSample",
    "OnlineLearner",
    "OnlineTrainer",
    "PiecewiseSchedule",
    "learner_of",
    "load_ckpt",
    "load_lora_state_dict",
    "lora_state_dict",
    "save_ckpt",
]
