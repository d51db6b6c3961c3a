"""Training one SAE on a stream of rows."""

from fastsae.training.config import CheckpointConfig as CheckpointConfig
from fastsae.training.config import DataConfig as DataConfig
from fastsae.training.config import LogConfig as LogConfig
from fastsae.training.config import OptimizerConfig as OptimizerConfig
from fastsae.training.config import ScheduleConfig as ScheduleConfig
from fastsae.training.config import TrainConfig as TrainConfig
from fastsae.training.group import TrainerGroup as TrainerGroup
from fastsae.training.trainer import Trainer as Trainer
