"""Which bundle is made from what, by whom: plans, meshes, dry runs."""
