"""What the server runs."""

from pbc.fleet.apps import server_app

app = server_app()
