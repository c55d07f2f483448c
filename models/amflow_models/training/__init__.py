"""Training and evaluation of video classifiers: the parts of ``python -m amflow_models.train`` and ``.evaluate``.

Needs ``pip install 'amflow-kernels[train]'``.
"""
