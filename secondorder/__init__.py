from secondorder import _C
