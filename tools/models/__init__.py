"""Models written out in plain torch at published dimensions, and the pieces they are cut into.

`names`, `config`, `build`: the models. `pieces`: what a compiler backend would get, with fake values. `save_piece`,
`load_piece`: a piece as JSON; `piece_of` makes one of a graph. `whole`, `run_whole`: a model run through its pieces.
"""

from terrazzo.tools.models import ops as ops
from terrazzo.tools.models.config import ModelConfig, RopeScaling, config, names
from terrazzo.tools.models.fill import Fill
from terrazzo.tools.models.piece import Piece, piece_of
from terrazzo.tools.models.store import load_piece, save_piece
from terrazzo.tools.models.whole import DTYPES, Whole, build, pieces, run_eagerly, run_whole, whole

__all__ = [
    "DTYPES",
    "Fill",
    "ModelConfig",
    "Piece",
    "RopeScaling",
    "Whole",
    "build",
    "config",
    "load_piece",
    "names",
    "piece_of",
    "pieces",
    "run_eagerly",
    "run_whole",
    "save_piece",
    "whole",
]
