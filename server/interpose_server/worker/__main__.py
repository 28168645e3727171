"""`python -m interpose_server.worker`."""

from .main import main

main()
