"""An audit of what shared updates give away: attacks by someone who holds candidate photos."""
