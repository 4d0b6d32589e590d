from core import answer

print(answer)
