"""recipelin: converts pretrained Transformers to hybrid linear attention, from a recipe, reproducibly and honestly."""

__version__ = "0.1.0"
