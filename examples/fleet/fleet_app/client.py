"""What a node runs."""

from pbc.fleet.apps import client_app

app = client_app()
