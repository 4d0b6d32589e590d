from harbour_core import berths

ships = berths - 1
