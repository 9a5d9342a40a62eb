"""A seeded generator of card transactions, fraud among them, and of the labels that follow. The same seed gives the same bytes."""

from loadtest.simulator.config import SimulatorConfig
from loadtest.simulator.patterns import PATTERNS, Incident
from loadtest.simulator.stream import Simulator

__all__ = ["PATTERNS", "Incident", "Simulator", "SimulatorConfig"]
