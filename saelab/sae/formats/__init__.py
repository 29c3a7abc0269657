"""File formats of SAEs, one a file: ``read`` makes an SAE of a folder, ``pack`` lays one out for writing.

``detect`` tells which format lies in a folder, ``files`` reads tensors and JSON that nobody vouches for, ``weights``
holds the algebra that folds a format's options into plain weights.
"""
