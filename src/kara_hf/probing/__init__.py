"""What PoD and calibration both do before a cache: data, recorded attention, fitted scores."""
