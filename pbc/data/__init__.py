"""Images in, arrays out: folders or zip files of photos, decoded alike on compiler and device."""

from pbc.data.decoding import BrokenImageError, UnsupportedImageError
from pbc.data.inventory import Inventory
from pbc.data.layout import Classes, class_names, has_held_out, labelled
from pbc.data.pooling import pooled_view
from pbc.data.samples import UNLABELLED, ImageFolder, Samples, images, read_image
from pbc.data.spec import InputSpec

__all__ = [
    "UNLABELLED",
    "BrokenImageError",
    "Classes",
    "ImageFolder",
    "InputSpec",
    "Inventory",
    "Samples",
    "UnsupportedImageError",
    "class_names",
    "has_held_out",
    "images",
    "labelled",
    "pooled_view",
    "read_image",
]
