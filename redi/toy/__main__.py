from redi.toy.student import main

if __name__ == "__main__":
    main()
