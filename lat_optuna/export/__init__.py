"""A front's point as something to deploy: an ordinary checkpoint, ONNX, int8; checked before it is called done.

``onnx`` makes graphs out of adapted models, ``compare`` measures what was made against torch, ``card`` describes it.
:mod:`lat_optuna.deploy` does all three for a point of a study.
"""
