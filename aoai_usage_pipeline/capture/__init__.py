"""What Event Hubs Capture wrote and where: blob names, Avro files, and a simulator that writes the same. Nothing about usage."""
