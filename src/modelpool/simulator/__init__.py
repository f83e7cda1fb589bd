"""What a pool would do with a trace of arrivals: the controller of core/ in virtual time, with measured costs."""
