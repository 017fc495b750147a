"""Families: one file each with its frozen Spec, its block, `body(...)`, its rows and the variants it admits.

The files import Keras inside functions only, so that names and tables are readable without it.
"""
