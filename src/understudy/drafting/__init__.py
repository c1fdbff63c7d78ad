"""What all drafters share: the protocols, the SPEC record, the registry and the reading of `NAME[:PATH][,key=value...]`."""
