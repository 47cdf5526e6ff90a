"""How a chain is run: what a transform says of itself becomes calls of the augment op.

``walk`` goes through a chain and collects steps; where it comes to a tensor stage, ``passes`` runs
the steps so far and ``stages`` the stage. ``fold`` has the steps write themselves into the
``table`` of an augment call, into as few calls as are right. ``draws`` has the random numbers,
``images`` what users pass and get, ``affine`` the maps of the plane, ``samples`` the arrays with
one entry a sample, ``step`` what every step has in common.
"""
