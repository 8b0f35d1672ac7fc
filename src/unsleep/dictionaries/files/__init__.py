"""Dictionary files in the layouts of SAELens, sparsify and dictionary_learning; crosscoders of other libraries."""

from unsleep.dictionaries.files.folders import load_dictionary, save_dictionary

__all__ = ["load_dictionary", "save_dictionary"]
