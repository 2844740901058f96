"""A denoising to look at: in the terminal while it happens, as a GIF, or as a page with a slider."""

from trl_diffusion.viewing.colours import COLOURINGS
from trl_diffusion.viewing.denoising import Cell, Denoising, Frame, Kind
from trl_diffusion.viewing.gif import write_gif
from trl_diffusion.viewing.page import write_page
from trl_diffusion.viewing.terminal import LiveView, picture

__all__ = ["COLOURINGS", "Cell", "Denoising", "Frame", "Kind", "LiveView", "picture", "write_gif", "write_page"]
