"""One module per event contract, each with one `CONTRACT`. A module belongs here when a gateway sends that body to the event hub."""
