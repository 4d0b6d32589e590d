def test_smoke(cluster):
    print(cluster.list())
