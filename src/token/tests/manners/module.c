/* A PKCS#11 module that forwards to a real one (MANNERS_MODULE) and imitates what other vendors' tokens do.
 *
 * MANNERS is a list of words:
 *
 *     returned       AES-GCM as AWS CloudHSM: an IV that is not zero is refused, the token writes its own
 *                    over the 12 zeros at C_Encrypt
 *     vague          with it: the refusal is CKR_DATA_INVALID, which says nothing of an IV
 *     appended       AES-GCM as Thales Luna in FIPS mode: the caller's IV is ignored, 16 bytes of the
 *                    token's are appended to ciphertext and tag
 *     no-gcm-seal    no C_EncryptInit by AES-GCM
 *     no-gcm         no AES-GCM at all
 *     no-cmac        no AES-CMAC
 *     no-import      no C_CreateObject, as strict tokens have it
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long ulong_t;
typedef ulong_t (*call_t)();

#define FUNCTIONS 68
struct list {
    unsigned char major, minor;
    call_t at[FUNCTIONS];
};

/* Places in CK_FUNCTION_LIST (PKCS#11 2.40 §3.6, counted from C_Initialize). */
enum {
    GET_FUNCTION_LIST = 3,
    CREATE_OBJECT = 20,
    ENCRYPT_INIT = 29,
    ENCRYPT = 30,
    DECRYPT_INIT = 33,
    SIGN_INIT = 42,
    GENERATE_RANDOM = 64
};

#define CKM_AES_GCM 0x1087UL
#define CKM_AES_CMAC 0x108AUL
#define CKR_DATA_INVALID 0x20UL
#define CKR_FUNCTION_NOT_SUPPORTED 0x54UL
#define CKR_MECHANISM_INVALID 0x70UL
#define CKR_MECHANISM_PARAM_INVALID 0x71UL
#define CKR_BUFFER_TOO_SMALL 0x150UL

struct mechanism {
    ulong_t kind;
    void *parameter;
    ulong_t len;
};

struct gcm {
    unsigned char *iv;
    ulong_t iv_len, iv_bits;
    unsigned char *aad;
    ulong_t aad_len, tag_bits;
};

static struct list ours, *real;

/* One encryption by AES-GCM under way per session. */
#define SESSIONS 256
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    ulong_t session;
    unsigned char iv[16], *out;
    int how;
} active[SESSIONS];

static int is(const char *word) {
    const char *manners = getenv("MANNERS");
    char text[256];
    snprintf(text, sizeof text, "%s", manners ? manners : "");
    char *rest = text, *each;
    while ((each = strsep(&rest, " ")))
        if (!strcmp(each, word))
            return 1;
    return 0;
}

static ulong_t create_object(ulong_t session, void *attributes, ulong_t count, ulong_t *object) {
    if (is("no-import"))
        return CKR_FUNCTION_NOT_SUPPORTED;
    return real->at[CREATE_OBJECT](session, attributes, count, object);
}

static ulong_t sign_init(ulong_t session, struct mechanism *mechanism, ulong_t key) {
    if (mechanism->kind == CKM_AES_CMAC && is("no-cmac"))
        return CKR_MECHANISM_INVALID;
    return real->at[SIGN_INIT](session, mechanism, key);
}

static ulong_t decrypt_init(ulong_t session, struct mechanism *mechanism, ulong_t key) {
    if (mechanism->kind == CKM_AES_GCM && is("no-gcm"))
        return CKR_MECHANISM_INVALID;
    return real->at[DECRYPT_INIT](session, mechanism, key);
}

static ulong_t encrypt_init(ulong_t session, struct mechanism *mechanism, ulong_t key) {
    if (mechanism->kind != CKM_AES_GCM)
        return real->at[ENCRYPT_INIT](session, mechanism, key);
    if (is("no-gcm") || is("no-gcm-seal"))
        return CKR_MECHANISM_INVALID;
    int how = is("returned") ? 1 : is("appended") ? 2 : 0;
    if (!how)
        return real->at[ENCRYPT_INIT](session, mechanism, key);
    struct gcm gcm = *(struct gcm *)mechanism->parameter;
    static const unsigned char zeros[12];
    if (how == 1 && (gcm.iv_len != 12 || memcmp(gcm.iv, zeros, 12)))
        return is("vague") ? CKR_DATA_INVALID : CKR_MECHANISM_PARAM_INVALID;
    unsigned char iv[16], *out = gcm.iv;
    ulong_t code = real->at[GENERATE_RANDOM](session, iv, 16UL);
    if (code)
        return code;
    gcm.iv = iv;
    gcm.iv_len = how == 1 ? 12 : 16;
    gcm.iv_bits = 8 * gcm.iv_len;
    struct mechanism with = {CKM_AES_GCM, &gcm, sizeof gcm};
    code = real->at[ENCRYPT_INIT](session, &with, key);
    if (code)
        return code;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < SESSIONS; i++)
        if (!active[i].how) {
            active[i].session = session;
            active[i].how = how;
            active[i].out = out;
            memcpy(active[i].iv, iv, 16);
            break;
        }
    pthread_mutex_unlock(&lock);
    return 0;
}

static ulong_t encrypt(ulong_t session, void *data, ulong_t len, unsigned char *out, ulong_t *out_len) {
    int how = 0;
    unsigned char iv[16], *back = NULL;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < SESSIONS; i++)
        if (active[i].how && active[i].session == session) {
            how = active[i].how;
            back = active[i].out;
            memcpy(iv, active[i].iv, 16);
            active[i].how = 0;
        }
    pthread_mutex_unlock(&lock);
    if (how == 2 && *out_len < len + 32)
        return CKR_BUFFER_TOO_SMALL;
    ulong_t code = real->at[ENCRYPT](session, data, len, out, out_len);
    if (code || !how)
        return code;
    if (how == 1) {
        memcpy(back, iv, 12);
    } else {
        memcpy(out + *out_len, iv, 16);
        *out_len += 16;
    }
    return 0;
}

ulong_t C_GetFunctionList(struct list **list) {
    if (!real) {
        const char *path = getenv("MANNERS_MODULE");
        void *module = dlopen(path ? path : "/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW | RTLD_LOCAL);
        if (!module) {
            fprintf(stderr, "%s\n", dlerror());
            return 5;
        }
        call_t get = (call_t)dlsym(module, "C_GetFunctionList");
        if (!get || get(&real))
            return 5;
        ours = *real;
        ours.at[GET_FUNCTION_LIST] = (call_t)C_GetFunctionList;
        ours.at[CREATE_OBJECT] = (call_t)create_object;
        ours.at[ENCRYPT_INIT] = (call_t)encrypt_init;
        ours.at[ENCRYPT] = (call_t)encrypt;
        ours.at[DECRYPT_INIT] = (call_t)decrypt_init;
        ours.at[SIGN_INIT] = (call_t)sign_init;
    }
    *list = &ours;
    return 0;
}
