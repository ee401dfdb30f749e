"""Kalma and what it is made of; needs torch alone."""

from kalmagrove.optim.groups import describe_groups, kalma_groups
from kalmagrove.optim.kalma import Kalma
from kalmagrove.optim.schedules import learning_rate_factor

__all__ = ["Kalma", "describe_groups", "kalma_groups", "learning_rate_factor"]
