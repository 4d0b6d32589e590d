berths = 9
