"""PACT: co-train tool-use agents on expert traces and rollouts. The parts are imported from their own modules."""

__version__ = "0.1.0"
