"""What stands in a chat's message and is nobody's words: marks of the app, what is quoted, what is forwarded."""

import re

INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
"""Letters without a width: marks of direction, joints and byte orders; not the joiners that emoji and Persian need."""

_APP = "\u200e\u200f"
"""WhatsApp on iOS puts one of these ahead of all that it writes itself, in every language."""

APP_MARK = "a mark of the chat's app (a photo, a call, a deleted message)"
FORWARDED = "a forwarded message in a chat"
QUOTED = "a message in a chat that only quotes"
SERVICE = "a message of the chat's service (somebody joined, a call)"
"""Reasons for which a message is left out."""

_KIND = (
    "image|photo|picture|video|audio|sticker|gif|document|file|media|contact card|voice message|bild|foto|"
    "dokument|datei|"
    "kontaktkarte|sprachnachricht|medien|vidéo|document|fiche contact|fichier|médias?|imagen|vídeo|documento|archivo|"
    "tarjeta de contacto|multimedia|imagem|figurinha|arquivo|mídia|immagine|adesivo|file|afbeelding|contactkaart|"
    "изображение|видео|аудио|стикер|документ|файл|контакт|карточка контакта|без медиафайлов|медиафайл|görüntü|"
    "fotoğraf|"
    "belge|çıkartma|ses|medya|obraz|zdjęcie|wideo|naklejka|plik|dźwięk|dokument|obrázek|nálepka|kép|videó|"
    "صورة|فيديو|ملصق|مستند|الوسائط|תמונה|סרטון|מסמך|סטיקר|चित्र|वीडियो|图片|圖片|视频|影片|文件|画像|動画|スタンプ|"
    "사진|동영상|이모티콘|파일|음성메시지"
)
_OMITTED = (
    "omitted|not included|weggelassen|ausgeschlossen|absente?|omise?|exclue?s?|omitid[oa]s?|omess[oa]|ocult[oa]s?|"
    "weggelaten|verwijderd|пропущено?|опущено?|пропущен[оа]?|dahil edilmedi|atlandı|pominięt[yeoa]|vynechán[oay]?|"
    "kihagyva|utelämnad|udeladt|utelatt|puuttuu|محذوفة?|تم استبعاد|הושמטה?|छोड़ दिया गया|已省略|已忽略|省略|생략|"
    "non inclus[oa]|nicht enthalten|no incluid[oa]|no encontrado|quitad[oa]|attached"
)
_ATTACHED = (
    "file attached|datei angehängt|fichier joint|archivo adjunto|arquivo anexado|file allegato|bestand bijgevoegd|"
    "файл добавлен|dosya ekli|ekli dosya|załączono plik|plik dołączony|přiložený soubor|bifogad fil|vedhæftet fil"
)
_DELETED = (
    r"(?:this|your) message was deleted|you deleted this message|message deleted|deleted message|"
    r"(?:diese nachricht wurde|du hast diese nachricht|nachricht) gelöscht|"
    r"(?:ce message a été|vous avez|message) supprimé(?: ce message)?|"
    r"(?:se eliminó este mensaje|este mensaje fue eliminado|eliminaste este mensaje|mensaje eliminado)|"
    r"(?:esta mensagem foi|mensagem|você) (?:apagada|apagou esta mensagem)|essa mensagem foi apagada|"
    r"(?:questo messaggio è stato|hai|messaggio) eliminato(?: questo messaggio)?|"
    r"(?:dit bericht is|je hebt dit bericht|bericht) verwijderd|"
    r"(?:данное )?(?:это )?сообщение удалено|вы удалили (?:данное|это) сообщение|bu mesaj silindi|bu mesajı sildiniz|"
    r"(?:ta|ten) wiadomość została usunięta|usunięto tę wiadomość|wiadomość usunięta|"
    r"tato zpráva byla smazána|det här meddelandet (?:raderades|har raderats)|denne (?:besked|"
    r"melding)(?:en)? (?:blev|ble) slettet|"
    r"تم حذف هذه الرسالة|لقد حذفت هذه الرسالة|הודעה זו נמחקה|מחקת הודעה זו|यह संदेश (?:मिटाया|हटाया) गया(?: था)?|"
    r"此消息已(?:被)?删除|您删除了此消息|此訊息已(?:被)?刪除|このメッセージは削除されました|メッセージの送信を取り消しました|"
    r".{0,40}(?:unsent a message|撤回了一条消息|收回訊息|がメッセージの送信を取り消しました)|삭제된 메시지입니다|"
    r"waiting for this message.{0,60}|warten auf diese nachricht.{0,60}"
)
_CALL = (
    r"(?:missed|declined|no answer|cancell?ed|silenced)[ -]?(?:group )?(?:voice|video|audio|phone)? ?call.{0,40}|"
    r"(?:voice|video|group|audio) call(?:[,.:].{0,60})?|call ended.{0,40}|"
    r"(?:verpasster?|entgangener?) (?:sprach|video|gruppen)?-?anruf.{0,40}|(?:sprach|video|"
    r"gruppen)anruf(?:[,.:].{0,60})?|"
    r"appel (?:vocal|vidéo|audio)?.{0,12}manqué.{0,40}|(?:llamada|chamada) .{0,20}perdida.{0,40}|"
    r"chiamata .{0,20}persa.{0,40}|gemiste? .{0,12}(?:oproep|gesprek).{0,40}|пропущенный .{0,14}звонок.{0,40}|"
    r"cevapsız .{0,12}arama.{0,40}|nieodebrane połączenie.{0,40}|مكالمة .{0,12}فائتة.{0,40}|"
    r"שיחה .{0,12}שלא נענתה.{0,40}|"
    r"未接(?:语音|視訊|视频|語音)?(?:通话|通話|来电|來電).{0,40}|不在着信.{0,40}|"
    r"부재중 (?:음성|영상)? ?(?:전화|통화).{0,40}"
)
_PLACE = (
    "(?:live )?(?:location|standort|ubicación|localisation|position|posizione|localização|locatie|konum|"
    "местоположение|"
    "lokalizacja|الموقع|מיקום|位置|위치)(?: shared)?"
)
_WHOLE = re.compile(
    rf"(?i)(?:<[^<>\n]{{2,120}}>|\[ ?[^\[\]\n]{{1,40}} ?\]|null|☎.{{0,40}}|"
    rf"(?:{_KIND})s?(?: \d+장)?|(?:{_KIND})s? (?:was |wurde |has been )?(?:{_OMITTED})|(?:{_OMITTED}) (?:{_KIND})|"
    rf"\S{{1,120}}\.[A-Za-z0-9]{{2,5}} \([^()\n]{{3,60}}\)|"
    rf"[^\n]{{1,120}}\.[A-Za-z0-9]{{2,5}} \((?:{_ATTACHED})\)|(?:{_DELETED})[.。!]?|(?:{_CALL})|"
    rf"{_PLACE}[:：] ?https?://\S+|[^\n]{{0,60}}https://maps\.google\.com/\?q=\S+)"
)
"""A whole line that an app writes where a message holds no text."""

_TAIL = re.compile(
    rf"(?i)\s*[{_APP}]*(?:[{_APP}]\s*<[^<>\n]*>|<[^\W\d_][^<>\n]*\s[^<>\n]*>|"
    r"\((?:edited|bearbeitet|modifiée?|editado|modificato|bewerkt|изменено|ред\.|düzenlendi|edytowane|編集済み?|已编辑|"
    r"수정됨)\))$"
)
"""Behind a message: <This message was edited>, in any language; (edited)."""

_FORWARD = re.compile(
    r"(?i)^\s*[\[({<*_~]{0,3}(?:forwarded(?: from| message)?|fwd from|weitergeleitet(?:e nachricht)?(?: von)?|"
    r"transféré(?: de| par)?|reenviado(?: de)?|encaminhad[ao](?: de)?|inoltrato(?: da)?|doorgestuurd(?: van)?|"
    r"переслано(?: от| из)?|пересланное сообщение|переслане повідомлення|iletildi|przekazano(?: od| dalej)?|"
    r"přeposláno(?: od)?|vidarebefordrat(?: från)?|تمت إعادة التوجيه|הועברה? מ|转发自|轉發自|转发|転送|"
    r"전달됨)\b[^\n]{0,80}[\])}>*_~:：]"
)
_TAPBACK = re.compile(
    r"(?is)^(?:(?:liked|loved|disliked|laughed at|emphasi[sz]ed|questioned|reacted .{1,12} to) "
    r"(?:an image|a photo|[\"“].*[\"”]))\s*$"
)
"""What iMessage writes for a reaction."""

_META = re.compile(
    r"(?is)^(?:reacted .{1,24} to your message|liked a message|"
    r"(?:hat )?(?:mit .{1,24} )?auf (?:deine|eine) nachricht (?:mit .{1,24} )?reagiert|"
    r"reagierte mit .{1,24} auf .{0,12}nachricht|"
    r"a réagi .{1,24} (?:à|a) votre message|reaccionó con .{1,24} a tu mensaje|"
    r"ha (?:aggiunto la reazione|reagito).{0,24} al tuo messaggio|reagiu com .{1,24} (?:à|a) (?:sua|tua) mensagem|"
    r"heeft met .{1,24} op je bericht gereageerd|heeft .{0,12}gereageerd met .{1,24} op je bericht|"
    r"zareagował\(?a?\)? .{1,24} na twoją wiadomość|mesajına .{1,24} ifadesini bıraktı|"
    r"реакция .{1,24} на ваше сообщение|.{0,24}отреагировала?.{0,40}сообщение|"
    r"reagerade med .{1,24} på ditt meddelande|"
    r"(?:you|[^\n]{1,40}) (?:sent|shared) (?:an? |a )?(?:attachment|photo|video|link|sticker|gif|voice message|"
    r"post|reel|story|location|live location)s?|"
    r"du hast (?:einen|eine|ein) (?:anhang|foto|video|link|sticker|sprachnachricht|beitrag) (?:gesendet|geteilt)|"
    r"(?:you|[^\n]{1,40}) (?:missed|started|joined|left) (?:an? |the )?(?:audio |video |voice )?(?:call|chat|"
    r"group|poll|plan)[^\n]{0,40}|"
    r"you (?:can now (?:call|message)|are now connected|waved at|called|unsent a message|changed|named|set|"
    r"added|removed|created)\b[^\n]{0,120})[.!]?\s*$"
)


def without_marks(text: str, of_meta: bool = False) -> tuple[str, str | None]:
    """A message without what the app put into it; where nothing is left, the reason why.

    text: with its letters of no width, by which WhatsApp's own marks are known
    of_meta: an export of Facebook or Instagram, which writes of reactions, calls and attachments in sentences
    """
    if _FORWARD.match(INVISIBLE.sub("", text)):
        return "", FORWARDED
    kept: list[str] = []
    quoted = marked = False
    for line in text.split("\n"):
        shown = _TAIL.sub("", line.rstrip()) if line.strip() else line
        bare = INVISIBLE.sub("", shown).strip()
        if bare.startswith(("> ", "&gt;")) or bare == ">":
            quoted = True
        elif shown.lstrip().startswith(tuple(_APP)) or (bare and _WHOLE.fullmatch(bare)):
            marked = True
        elif bare or not line.strip():
            kept.append(INVISIBLE.sub("", shown))
        else:
            marked = True
    left = "\n".join(kept).strip()
    if left and (_TAPBACK.match(left) or (of_meta and _META.match(left))):
        return "", APP_MARK
    return left, None if left else APP_MARK if marked or not quoted else QUOTED
