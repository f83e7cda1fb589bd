"""The execution plane of one machine: its devices, its engine hosts, and the HTTP service that gives orders to them."""
