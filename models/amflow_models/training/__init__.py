"""Training and evaluation of video classifiers: what ``python -m amflow_models.train`` and ``.evaluate`` are made of.

Needs ``pip install 'amflow-kernels[train]'``.
"""
