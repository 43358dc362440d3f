"""Where a run is recorded besides its files: Weights & Biases, CSV or nowhere, behind one small interface."""

from src.tracking.base import NoTracker
from src.tracking.files import CSVTracker
from src.tracking.groups import group_of
from src.tracking.weights_and_biases import Tracker, no_login

__all__ = ["CSVTracker", "NoTracker", "Tracker", "group_of", "no_login"]
