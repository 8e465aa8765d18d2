/* web PORT [TITLE]: a web server with one page. It tells its process id and who asked, as the tests expect of nginx and
   httpd; TITLE only makes it longer to look at. */
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static const char page[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\nConnection: close\r\n\r\n<p>It works</p>";

int main(int argc, char **argv) {
    char request[4096];
    int yes = 1, listener = socket(AF_INET6, SOCK_STREAM, 0);
    struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_port = htons(argc > 1 ? atoi(argv[1]) : 80)};
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/var/run", 0755);
    snprintf(request, sizeof request, "/var/run/%s.pid", name);
    FILE *pid = fopen(request, "w");
    if (!pid || fprintf(pid, "%d\n", getpid()) < 0 || fclose(pid)) return perror(request), 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 16)) return perror("listen"), 1;
    printf("%s: listening on port %d\n", name, ntohs(at.sin6_port));
    for (;;) {
        int there = accept(listener, NULL, NULL);
        if (there < 0) continue;
        if (read(there, request, sizeof request) > 0 && write(there, page, sizeof page - 1) > 0)
            printf("%s: asked\n", name);
        shutdown(there, SHUT_WR);
        while (read(there, request, sizeof request) > 0) {}
        close(there);
    }
}
