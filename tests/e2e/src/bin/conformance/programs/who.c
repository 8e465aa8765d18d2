/* Says which user it runs as: setuid, its owner, unless new privileges are forbidden. */
#include <stdio.h>
#include <unistd.h>

int main(void) {
    printf("Effective uid: %d\n", geteuid());
    return 0;
}
