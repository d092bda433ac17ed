"""The Event Hub itself: what it says about its partitions, reading its events into capture files, sending to it. Nothing about usage."""
