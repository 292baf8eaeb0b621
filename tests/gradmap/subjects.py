"""Pico models to choose layers of."""

from gradmap.data.calibration import Calibration
from gradmap.methods.selection import Subject


def subject_of(pico, input_ids, **options):
    return Subject(pico.layered(), Calibration("test", 3, input_ids), **options)
