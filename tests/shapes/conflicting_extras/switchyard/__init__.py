tracks = 12
