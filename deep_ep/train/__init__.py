"""A byte-level MoE transformer trained through `deep_ep`: the library at work, and its end-to-end test."""

from deep_ep.train.config import TrainConfig
from deep_ep.train.launch import launch
from deep_ep.train.session import run_training

__all__ = ["TrainConfig", "launch", "run_training"]
