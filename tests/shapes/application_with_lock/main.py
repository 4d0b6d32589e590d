def main():
    print("Hello from report!")


if __name__ == "__main__":
    main()
